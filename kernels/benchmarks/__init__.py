"""What the ops cost: against other projects', against another commit, against a device's limits.

`fallback` measures the gated delta rule on a CPU, `suite` every op on a GPU, `base` two commits.
They share the ops (`ops`), their inputs (`cases`), the clock (`timing`), least costs (`roofline`)
and the check before a figure (`check`); `report` shows their results. `compiled` compiles the
Triton kernels without a GPU.
"""
