"""The mechanism. It knows no model class: what provides blocks and states is a `Backbone`.

To be read in this order: `minimal` (Algorithm 1 for one row), `options` and `backbone` (what it
needs), `state` and `cache` (what is carried), `forward` (pass 1), `algorithm` (passes 2..N and the
boundary); then `execution` (eager or CUDA graphs), `weights`, `storage`, `generation`.
"""
