"""Names of the intents of CLINC150 and Banking77, in the order of their numbers on the hub.

CLINC150: Larson et al., "An Evaluation Dataset for Intent Classification and Out-of-Scope
Prediction", arXiv 1909.02027, clinc/oos-eval on GitHub; domains from its data/domains.json, numbers
as in `clinc_oos` on the hub. One, oos (out of scope), is in no domain. Banking77: Casanueva et al.,
"Efficient Intent Detection with Dual Sentence Encoders", arXiv 2003.04807, `PolyAI/banking77` on
the hub.
"""

CLINC150 = tuple(
    """
    restaurant_reviews nutrition_info account_blocked oil_change_how time weather redeem_rewards
    interest_rate gas_type accept_reservations smart_home user_name report_lost_card repeat
    whisper_mode what_are_your_hobbies order jump_start schedule_meeting meeting_schedule
    freeze_account what_song meaning_of_life restaurant_reservation traffic make_call text
    bill_balance improve_credit_score change_language no measurement_conversion timer flip_coin
    do_you_have_pets balance tell_joke last_maintenance exchange_rate uber car_rental
    credit_limit oos shopping_list expiration_date routing meal_suggestion tire_change todo_list
    card_declined rewards_balance change_accent vaccines reminder_update food_last
    change_ai_name bill_due who_do_you_work_for share_location international_visa calendar
    translate carry_on book_flight insurance_change todo_list_update timezone cancel_reservation
    transactions credit_score report_fraud spending_history directions spelling insurance
    what_is_your_name reminder where_are_you_from distance payday flight_status find_phone
    greeting alarm order_status confirm_reservation cook_time damaged_card reset_settings
    pin_change replacement_card_duration new_card roll_dice income taxes date who_made_you
    pto_request tire_pressure how_old_are_you rollover_401k pto_request_status how_busy
    application_status recipe calendar_update play_music yes direct_deposit credit_limit_change
    gas pay_bill ingredients_list lost_luggage goodbye what_can_i_ask_you book_hotel
    are_you_a_bot next_song change_speed plug_type maybe w2 oil_change_when thank_you
    shopping_list_update pto_balance order_checks travel_alert fun_fact sync_device
    schedule_maintenance apr transfer ingredient_substitution calories current_location
    international_fees calculator definition next_holiday update_playlist mpg min_payment
    change_user_name restaurant_suggestion travel_notification cancel pto_used travel_suggestion
    change_volume
    """.split()
)

CLINC150_DOMAINS = {
    domain: tuple(intents.split())
    for domain, intents in {
        "banking": """
            freeze_account routing pin_change bill_due pay_bill account_blocked interest_rate
            min_payment bill_balance transfer order_checks balance spending_history transactions
            report_fraud
        """,
        "credit_cards": """
            replacement_card_duration expiration_date damaged_card improve_credit_score
            report_lost_card card_declined credit_limit_change apr redeem_rewards credit_limit
            rewards_balance application_status credit_score new_card international_fees
        """,
        "kitchen_and_dining": """
            food_last confirm_reservation how_busy ingredients_list calories nutrition_info
            recipe restaurant_reviews restaurant_reservation meal_suggestion
            restaurant_suggestion cancel_reservation ingredient_substitution cook_time
            accept_reservations
        """,
        "home": """
            what_song play_music todo_list_update reminder reminder_update calendar_update
            order_status update_playlist shopping_list calendar next_song order todo_list
            shopping_list_update smart_home
        """,
        "auto_and_commute": """
            current_location oil_change_when oil_change_how uber traffic tire_pressure
            schedule_maintenance gas mpg distance directions last_maintenance gas_type
            tire_change jump_start
        """,
        "travel": """
            plug_type travel_notification translate flight_status international_visa timezone
            exchange_rate travel_suggestion travel_alert vaccines lost_luggage book_flight
            book_hotel carry_on car_rental
        """,
        "utility": """
            weather alarm date find_phone share_location timer make_call calculator definition
            measurement_conversion flip_coin spelling time roll_dice text
        """,
        "work": """
            pto_request_status next_holiday insurance_change insurance meeting_schedule payday
            taxes income rollover_401k pto_balance pto_request w2 schedule_meeting
            direct_deposit pto_used
        """,
        "small_talk": """
            who_made_you meaning_of_life who_do_you_work_for do_you_have_pets
            what_are_your_hobbies fun_fact what_is_your_name where_are_you_from goodbye
            thank_you greeting tell_joke are_you_a_bot how_old_are_you what_can_i_ask_you
        """,
        "meta": """
            change_speed user_name whisper_mode yes change_volume no change_language repeat
            change_accent cancel sync_device change_user_name change_ai_name reset_settings
            maybe
        """,
    }.items()
}

BANKING77 = tuple(
    """
    activate_my_card age_limit apple_pay_or_google_pay atm_support automatic_top_up
    balance_not_updated_after_bank_transfer balance_not_updated_after_cheque_or_cash_deposit
    beneficiary_not_allowed cancel_transfer card_about_to_expire card_acceptance card_arrival
    card_delivery_estimate card_linking card_not_working card_payment_fee_charged
    card_payment_not_recognised card_payment_wrong_exchange_rate card_swallowed
    cash_withdrawal_charge cash_withdrawal_not_recognised change_pin compromised_card
    contactless_not_working country_support declined_card_payment declined_cash_withdrawal
    declined_transfer direct_debit_payment_not_recognised disposable_card_limits
    edit_personal_details exchange_charge exchange_rate exchange_via_app
    extra_charge_on_statement failed_transfer fiat_currency_support get_disposable_virtual_card
    get_physical_card getting_spare_card getting_virtual_card lost_or_stolen_card
    lost_or_stolen_phone order_physical_card passcode_forgotten pending_card_payment
    pending_cash_withdrawal pending_top_up pending_transfer pin_blocked receiving_money
    Refund_not_showing_up request_refund reverted_card_payment? supported_cards_and_currencies
    terminate_account top_up_by_bank_transfer_charge top_up_by_card_charge
    top_up_by_cash_or_cheque top_up_failed top_up_limits top_up_reverted topping_up_by_card
    transaction_charged_twice transfer_fee_charged transfer_into_account
    transfer_not_received_by_recipient transfer_timing unable_to_verify_identity
    verify_my_identity verify_source_of_funds verify_top_up virtual_card_not_working
    visa_or_mastercard why_verify_identity wrong_amount_of_cash_received
    wrong_exchange_rate_for_cash_withdrawal
    """.split()
)
