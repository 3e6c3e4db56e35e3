"""What the ops cost: against their peers, against another commit, against what a device allows.

`fallback` measures the gated delta rule on a CPU, `suite` every op on a GPU, `base` two commits.
They share the ops (`contenders`), their inputs (`cases`), the clock (`timing`), least costs
(`roofline`) and the check before a figure (`check`).
"""
