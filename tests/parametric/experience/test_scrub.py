"""Secrets leave a text before it is kept; ordinary text stays as it is."""

from __future__ import annotations

import pytest

from hybrid_sleep.parametric.experience.scrub import luhn, scrub, scrub_data

# Numbers that card issuers publish for tests; the first is the example of the standard's annex B.
VALID = ("79927398713", "4111111111111111", "378282246310005", "5555555555554444", "0")
INVALID = ("79927398710", "4111111111111112", "4111111111111121", "1")


def test_luhn_against_published_numbers():
    assert [luhn(x) for x in VALID] == [True] * len(VALID)
    assert [luhn(x) for x in INVALID] == [False] * len(INVALID)
    # Every single digit that is misread is noticed.
    number = "4111111111111111"
    for place in range(16):
        wrong = {number[:place] + digit + number[place + 1 :] for digit in "0123456789"}
        assert [x for x in wrong if luhn(x)] == [number]


SECRETS = (
    ("Write to ada.byron+x@mail.example.org, please", "ada.byron", "E-Mail Address"),
    ("Call +351 912 345 678 now", "345", "Phone Number"),
    ("Call (555) 123-4567 now", "4567", "Phone Number"),
    ("Call 089/12345678 now", "12345678", "Phone Number"),
    ("Card 4111 1111 1111 1111 123, thanks", "1111", "Card Number"),
    ("Card 4111-1111-1111-1111", "1111", "Card Number"),
    ("Card 378282246310005.", "378282246310005", "Card Number"),
    ("The key is AKIAIOSFODNN7EXAMPLE here", "AKIA", "AWS Access Key"),
    ("password = 'hunter2!x' it was", "hunter2", "Secret Keyword"),
    ("password: hunter2 it was", "hunter2", "Secret Keyword"),
    ("see https://bob:s3cretpw@localhost/x", "s3cretpw", "Basic Auth Credentials"),
    ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "qrstu", "Base64 High Entropy String"),
    ("sk_live_4eC39HqLyjWDarjtT1zdp7dc", "HqLyj", "Base64 High Entropy String"),
    ("a token q9Xv2LkP0ZrT8mWb4YtJ6nHs1cDg it is", "ZrT8", "Base64 High Entropy String"),
    ("md5 d41d8cd98f00b204e9800998ecf8427e", "98ecf", "Hex High Entropy String"),
    (
        "-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----",
        "MIIabc",
        "Private Key",
    ),
    ("-----BEGIN PRIVATE KEY-----\nMIIabc and no end", "MIIabc", "Private Key"),
)


@pytest.mark.parametrize(("text", "secret", "kind"), SECRETS)
def test_a_secret_is_replaced_by_its_kind(text, secret, kind):
    clean, counts = scrub(text)
    assert secret not in clean and f"[{kind} removed]" in clean
    assert counts[kind] == 1
    assert scrub(clean) == (clean, {})


def test_each_of_several_is_counted():
    clean, counts = scrub("a@b.org c@d.org password: x1 and password: x2 4111111111111111")
    assert counts == {"E-Mail Address": 2, "Secret Keyword": 2, "Card Number": 1}
    assert not any(x in clean for x in ("@", "x1", "x2", "4111"))


ORDINARY = (
    "Ada Byron has lived in Lisbon since 2019-11-28, at 12:30; 10 000 000 people do.",
    "1,234,567 items, version 3.11.2, pi is 3.14159265358979, 2019-2023 2024 2025.",
    "Rule 110: 0110111011010101 -> 1111101110111111",
    "from hybrid_sleep.parametric.experience.keys import Keys",
    "4111111111111112 has a wrong check digit, 1111111111111117 no industry.",
    "The password is required. 2026-11-28T14:22:33+01:00",
)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays(text):
    assert scrub(text) == (text, {})


def test_plain_data_is_scrubbed_inside_and_keeps_its_form():
    data = {"a@b.org": [1, 2.5, None, True, {"card": 4111111111111111, "to": ("x", "c@d.org")}]}
    clean, counts = scrub_data(data)
    mark = "[E-Mail Address removed]"
    inside = {"card": "[Card Number removed]", "to": ["x", mark]}
    assert clean == {mark: [1, 2.5, None, True, inside]}
    assert counts == {"E-Mail Address": 2, "Card Number": 1}
