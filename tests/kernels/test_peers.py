"""Optional packages behind the dispatcher: when they are taken, and that what they are given means
what is meant here. Each package is played by a stand-in with its signature, layout and demands."""

from __future__ import annotations

import copy
import sys
from importlib import metadata, util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hybrid_sleep.kernels import peers
from hybrid_sleep.kernels.common import dispatch
from hybrid_sleep.kernels.gated_delta_rule import reference as delta_rule
from hybrid_sleep.kernels.peers import causal_conv1d, fla, mamba_ssm
from hybrid_sleep.kernels.short_conv import reference as conv
from hybrid_sleep.kernels.short_conv import short_conv
from hybrid_sleep.kernels.ssd import reference as state_space
from hybrid_sleep.kernels.ssd import ssd

OPS = tuple(peers.PEERS)
INSIDE = {"gated_delta_rule": "0.6.1", "ssd": "2.3.2.post1", "short_conv": "1.7.0"}


def a_call(op, **changes):
    """One that the peer of `op` can compute."""
    dims = (4,) if op == "short_conv" else (64, 128)
    call = dispatch.Call("cuda", torch.bfloat16, 2, 64, 16, dims)
    return call._replace(**changes)


@pytest.fixture
def registry(monkeypatch):
    """Entries this test may change; no peer is installed until it says so."""
    entries = {op: copy.copy(entries) for op, entries in dispatch._registry.items()}
    monkeypatch.setattr(dispatch, "_registry", entries)
    monkeypatch.setattr(dispatch, "_last", {})
    monkeypatch.setattr(peers, "_failed", {})
    monkeypatch.setattr(peers, "version", lambda package, distribution: None)
    return entries


@pytest.fixture
def installed(registry, monkeypatch):
    """Every peer, in a version known here, as an empty module; Triton declines every call."""

    def version(package, distribution):
        (op,) = (op for op, peer in peers.PEERS.items() if peer.package == package)
        return INSIDE[op]

    monkeypatch.setattr(peers, "version", version)
    for op, peer in peers.PEERS.items():
        monkeypatch.setitem(sys.modules, peer.module, SimpleNamespace())
        registry[op] = [entry for entry in registry[op] if entry.name != "triton"]
    return registry


def entry(op):
    return next(e for e in dispatch._registry[op] if e.name == peers.PEERS[op].name)


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_a_peer_where_triton_declines(installed, op):
    path, run = dispatch._choose(op, "auto", a_call(op))
    assert path.name == peers.PEERS[op].name
    assert run is peers.PEERS[op].run
    assert peers.PEERS[op].distribution in path.reason
    assert dispatch._choose(op, "auto", a_call(op, device="cpu"))[0].name == "chunked"
    assert dispatch._choose(op, "auto", a_call(op, tokens=1))[0].name == "reference"


@pytest.mark.parametrize("op", OPS)
def test_triton_comes_first(installed, op):
    dispatch.register(op, "triton", print, rank=50, wants=lambda call: "fused")
    assert dispatch._choose(op, "auto", a_call(op))[0].name == "triton"


@pytest.mark.parametrize("op", OPS)
def test_a_peer_that_is_not_there_is_named_and_never_looked_for_on_a_cpu(registry, op, monkeypatch):
    distribution = peers.PEERS[op].distribution
    assert entry(op).rejects(a_call(op)) == f"the package {distribution} is not installed"
    refused = f"impl of {op} must be one that .*: the package {distribution} is not"
    with pytest.raises(ValueError, match=refused):
        dispatch._choose(op, peers.PEERS[op].name, a_call(op))

    def nowhere(*names):
        raise AssertionError("looked up")

    monkeypatch.setattr(peers, "version", nowhere)
    assert entry(op).wants(a_call(op, device="cpu")) is None
    assert "needs a CUDA device" in entry(op).rejects(a_call(op, device="cpu"))


@pytest.mark.parametrize("found", ["0.1", "99.0"])
@pytest.mark.parametrize("op", OPS)
def test_an_unknown_version_is_declined(installed, op, found, monkeypatch):
    monkeypatch.setattr(peers, "version", lambda *names: found)
    assert f"{found} is outside" in entry(op).rejects(a_call(op))


@pytest.mark.parametrize(
    "op, changes, reason",
    [
        ("gated_delta_rule", {"dtype": torch.float64}, "float64"),
        ("gated_delta_rule", {"dtype": torch.float32}, "TF32"),
        ("gated_delta_rule", {"dims": (320, 64)}, "up to 256, not 320"),
        ("gated_delta_rule", {"dims": (64, 512)}, None),
        ("gated_delta_rule", {"mask": True, "grad": True}, None),
        ("ssd", {"dtype": torch.float64}, "float64"),
        ("ssd", {"dtype": torch.float32}, "TF32"),
        ("ssd", {"grad": True}, "no stable gradient"),
        ("ssd", {"dims": (64, 512)}, "up to 256, not 512"),
        ("ssd", {"mask": True}, None),
        ("short_conv", {"dtype": torch.float64}, "float64"),
        ("short_conv", {"dtype": torch.float32, "grad": True}, None),
        ("short_conv", {"mask": True}, "no mask"),
        ("short_conv", {"dims": (5,)}, "width 2 to 4, not 5"),
        ("short_conv", {"dims": (1,)}, "width 2 to 4, not 1"),
        ("short_conv", {"heads": 12}, "multiples of 8 channels, not 12"),
        ("short_conv", {"tokens": 3}, "at least 4 tokens"),
    ],
)
def test_calls_that_a_peer_cannot_compute(installed, op, changes, reason):
    found = entry(op).rejects(a_call(op, **changes))
    assert found is None if reason is None else reason in found
    taken = dispatch._choose(op, "auto", a_call(op, **changes))[0].name
    assert taken == (peers.PEERS[op].name if reason is None else "chunked")


@pytest.mark.parametrize("op", OPS)
def test_a_peer_that_fails_to_import_fails_no_call(installed, op, monkeypatch, tmp_path):
    peer = peers.PEERS[op]
    monkeypatch.delitem(sys.modules, peer.module)
    broken = tmp_path / peer.package
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('0 active drivers')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert dispatch._choose(op, "auto", a_call(op))[0].name == "chunked"
    assert "RuntimeError: 0 active drivers" in entry(op).rejects(a_call(op))
    with pytest.raises(ValueError, match="0 active drivers"):
        dispatch._choose(op, peer.name, a_call(op))


def test_versions_are_looked_up_without_an_import(monkeypatch):
    peers.version.cache_clear()
    monkeypatch.setattr(util, "find_spec", lambda package: None if package == "gone" else object())

    def version(distribution):
        if distribution == "nameless":
            raise metadata.PackageNotFoundError(distribution)
        return "1.2.3"

    monkeypatch.setattr(metadata, "version", version)
    assert peers.version("here", "here") == "1.2.3"
    assert peers.version("gone", "gone") is None
    assert peers.version("here", "nameless") is None
    assert "here" not in sys.modules
    peers.version.cache_clear()


def test_no_peer_is_imported_with_the_ops():
    for peer in peers.PEERS.values():
        assert peer.package not in sys.modules


def test_only_an_ops_own_peer_is_among_its_candidates():
    for op, peer in peers.PEERS.items():
        others = set(dispatch.PEERS) - {peer.name}
        candidates = dispatch.explain(op, tokens=5)["candidates"]
        assert peer.name in candidates and not others & set(candidates)
    with pytest.raises(ValueError, match="impl of ssd must be one of 'auto', .*got 'fla'"):
        x = torch.randn(1, 3, 2, 4)
        ssd(x, x, x, -x[..., 0].abs(), impl="fla")


def compare(run, reference, arguments, options):
    """Values and gradients of an adapter against the fp64 reference, both called positionally."""
    results = []
    for compute, dtype in ((run, torch.float32), (reference, torch.float64)):
        leaves = [x if x is None else x.detach().to(dtype).requires_grad_() for x in arguments]
        found = [x for x in compute(*leaves, *options) if x is not None]
        drawn = torch.Generator().manual_seed(1)
        loss = sum((x * torch.randn(x.shape, generator=drawn).to(x.dtype)).sum() for x in found)
        grads = torch.autograd.grad(loss, [x for x in leaves if x is not None], allow_unused=True)
        results.append([*found, *(x for x in grads if x is not None)])
    assert len(results[0]) == len(results[1])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


def state_space_inputs(T, with_state, groups=2):
    B, H, K, V = 2, 4, 6, 5
    q, k = (F.normalize(torch.randn(B, T, groups, K), dim=-1) for _ in range(2))
    v, g = torch.randn(B, T, H, V), -torch.rand(B, T, H)
    # No decay at all has to be exact, too.
    g[:, ::3] = 0
    return q, k, v, g, torch.randn(B, H, K, V) if with_state else None


def some_pads(T):
    mask = torch.rand(2, T) > 0.3
    mask[0, : T // 2] = False
    return mask


class Fla:
    """chunk_gated_delta_rule and fused_recurrent_gated_delta_rule of flash-linear-attention."""

    def __init__(self):
        self.called = []

    def chunk_gated_delta_rule(
        self, q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, **others
    ):
        assert output_final_state and not others
        assert q.dtype == k.dtype == v.dtype and g.dtype == torch.float32
        assert initial_state is None or initial_state.dtype == torch.float32
        self.called.append("chunk")
        return delta_rule.gated_delta_rule(
            q, k, v, g, beta, initial_state, None, scale, None, output_final_state
        )

    def fused_recurrent_gated_delta_rule(self, q, k, v, g=None, gk=None, gv=None, **named):
        assert not torch.is_grad_enabled() and gk is None and gv is None
        results = self.chunk_gated_delta_rule(q, k, v, g, **named)
        self.called[-1] = "recurrent"
        return results


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("output", [False, True])
def test_flash_linear_attention_is_asked_the_same(monkeypatch, pads, output, with_state):
    T = 9
    fake = Fla()
    monkeypatch.setitem(sys.modules, fla.MODULE, fake)
    q, k, v, g, state = state_space_inputs(T, with_state, groups=4)
    mask = some_pads(T) if pads else None
    arguments = [q, k, v, g, torch.rand(2, T, 4), state]
    options = (mask, 0.7, None, output)
    compare(fla.gated_delta_rule, delta_rule.gated_delta_rule, arguments, options)
    assert fake.called == ["chunk"]


def test_one_token_takes_the_recurrent_kernel_unless_it_needs_a_gradient(monkeypatch):
    fake = Fla()
    monkeypatch.setitem(sys.modules, fla.MODULE, fake)
    q, k, v, g, state = state_space_inputs(1, True, groups=4)
    given = (q, k, v, g, torch.rand(2, 1, 4), state, None, 0.5, None, True)
    with torch.no_grad():
        o, S = fla.gated_delta_rule(*given)
    wanted_o, wanted_S = delta_rule.gated_delta_rule(*given)
    torch.testing.assert_close(o, wanted_o)
    torch.testing.assert_close(S, wanted_S)
    v.requires_grad_()
    fla.gated_delta_rule(*given)
    assert fake.called == ["recurrent", "chunk"]


def test_half_precision_reaches_a_peer_in_one_dtype(monkeypatch):
    monkeypatch.setitem(sys.modules, fla.MODULE, Fla())
    q, k, v, g, state = state_space_inputs(5, True, groups=4)
    given = (q, k, v.bfloat16(), g.bfloat16(), torch.rand(2, 5, 4), state.double())
    o, S = fla.gated_delta_rule(*given, None, 1.0, None, True)
    assert o.dtype == torch.bfloat16 and S.dtype == torch.float32


class MambaSsm:
    """chunk_state, state_passing and chunk_scan of mamba-ssm, from their published equations."""

    def chunk_state(self, B, x, dt, dA_cumsum, states_in_fp32=True):
        batch, T, groups, _ = B.shape
        heads, (_, _, chunks, size) = x.shape[2], dt.shape
        assert T == chunks * size and dt.shape == dA_cumsum.shape == (batch, heads, chunks, size)
        assert B.dtype == x.dtype and states_in_fp32
        B = B.repeat_interleave(heads // groups, 2).unflatten(1, (chunks, size)).float()
        left = (dA_cumsum[..., -1:] - dA_cumsum).exp() * dt
        return torch.einsum("bclhn,bhcl,bclhp->bchpn", B, left, x.unflatten(1, (chunks, size)))

    def state_passing(self, states, dA_chunk_cumsum, initial_states=None):
        batch, chunks, heads, dim = states.shape
        assert dA_chunk_cumsum.shape == (batch, heads, chunks)
        S = states.new_zeros(batch, heads, dim) if initial_states is None else initial_states
        assert S.shape == (batch, heads, dim) and S.dtype == torch.float32
        before = []
        for c in range(chunks):
            before.append(S)
            S = dA_chunk_cumsum[:, :, c, None].exp() * S + states[:, c]
        return torch.stack(before, 1), S

    def chunk_scan(self, B, C, x, dt, dA_cumsum, prev_states, D=None, z=None):
        batch, T, groups, n = B.shape
        heads, p, (_, _, chunks, size) = x.shape[2], x.shape[3], dt.shape
        assert T == chunks * size and prev_states.shape == (batch, chunks, heads, p, n)
        B, C = (y.repeat_interleave(heads // groups, 2) for y in (B, C))
        B, C, x = (y.unflatten(1, (chunks, size)).float() for y in (B, C, x))
        gap = dA_cumsum[..., :, None] - dA_cumsum[..., None, :]
        gap = gap.masked_fill(torch.ones(size, size).triu(1).bool(), float("-inf"))
        scores = torch.einsum("bclhn,bcshn->bhcls", C, B) * gap.exp() * dt[..., None, :]
        inside = torch.einsum("bhcls,bcshp->bclhp", scores, x)
        reach = torch.einsum("bclhn,bchpn->bclhp", C, prev_states)
        o = inside + reach * dA_cumsum.exp().permute(0, 2, 3, 1)[..., None]
        return o.flatten(1, 2).to(B.dtype)


@pytest.mark.parametrize("T", [1, 128, 150])
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("output", [False, True])
def test_mamba_ssm_is_asked_the_same(monkeypatch, T, pads, with_state, output):
    monkeypatch.setitem(sys.modules, mamba_ssm.MODULE, MambaSsm())
    *inputs, state = state_space_inputs(T, with_state)
    mask = some_pads(T) if pads else None
    if pads:
        inputs[2][~mask] = float("nan")
    given = (*inputs, state, mask, 0.6, None, output)
    o, S = mamba_ssm.ssd(*given)
    double = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
              for x in given]  # fmt: skip
    wanted_o, wanted_S = state_space.ssd(*double)
    torch.testing.assert_close(S.double(), wanted_S, rtol=1e-4, atol=1e-5)
    assert S.is_contiguous() and S.dtype == torch.float32
    if output:
        torch.testing.assert_close(o.double(), wanted_o, rtol=1e-4, atol=1e-5)
    else:
        assert o is None


class _Convolve(torch.autograd.Function):
    """Demands of causal-conv1d's backward pass on the layout of its output gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, state, activation):
        ctx.save_for_backward(x, weight, bias, state)
        ctx.activation = activation
        return _convolve(x, weight, bias, state, activation)

    @staticmethod
    def backward(ctx, dy, dtail):
        assert dtail.stride(1) == 1, "dfinal_states is read by rows"
        leaves = [x if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            results = _convolve(*leaves, ctx.activation)
        needed = [x for x in leaves if x is not None]
        grads = iter(torch.autograd.grad(results, needed, (dy, dtail)))
        return *(None if x is None else next(grads) for x in leaves), None


def _convolve(x, weight, bias, state, activation):
    everything = torch.cat([state, x], 2)
    y = F.conv1d(everything, weight[:, None], bias, groups=len(weight))
    tail = everything[:, :, -state.shape[2] :].mT.clone(memory_format=torch.contiguous_format).mT
    return (F.silu(y) if activation == "silu" else y), tail


class CausalConv1d:
    """causal_conv1d_fn of causal-conv1d, with what its C++ checks."""

    def causal_conv1d_fn(
        self, x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
        final_states_out=None, activation=None,
    ):  # fmt: skip
        batch, dim, T = x.shape
        assert x.stride(1) == 1 and x.stride(2) > 1 and dim % 8 == 0
        assert x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
        assert initial_states.shape == (batch, dim, weight.shape[1] - 1)
        assert initial_states.stride(1) == 1 and initial_states.dtype == x.dtype
        assert bias is None or bias.dtype == weight.dtype
        assert return_final_states and seq_idx is None and activation in (None, "silu")
        return _Convolve.apply(x, weight, bias, initial_states, activation)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("activation", ["silu", None])
def test_causal_conv1d_is_asked_the_same(monkeypatch, width, with_state, activation):
    monkeypatch.setitem(sys.modules, causal_conv1d.MODULE, CausalConv1d())
    B, T, E = 2, 9, 8
    # A slice of a wider projection, as the layers have it.
    x = torch.randn(B, T, 2 * E)[..., :E]
    state = torch.randn(B, width - 1, E) if with_state else None
    bias = None if with_state else torch.randn(E)
    arguments = [x, torch.randn(E, width), bias, state]
    compare(causal_conv1d.short_conv, conv.short_conv, arguments, (None, activation))


@pytest.mark.parametrize("used", [0, 1])
def test_causal_conv1d_gets_output_gradients_it_can_read(monkeypatch, used):
    """Of a result that nothing uses, and of one that was only summed."""
    monkeypatch.setitem(sys.modules, causal_conv1d.MODULE, CausalConv1d())
    x, weight = torch.randn(2, 6, 8, requires_grad=True), torch.randn(8, 3)
    found = torch.autograd.grad(
        causal_conv1d.short_conv(x, weight, None, None, None, "silu")[used].sum(), x
    )
    wanted = torch.autograd.grad(short_conv(x, weight, impl="reference")[used].sum(), x)
    torch.testing.assert_close(found, wanted)
