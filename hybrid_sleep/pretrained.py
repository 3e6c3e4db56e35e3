"""Loading, saving and initialisation: what every head of the model shares."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from hybrid_sleep.configuration import HybridSleepConfig
from hybrid_sleep.layers.embedding import CompoundEmbedding
from hybrid_sleep.layers.state_space import StateSpaceMixer
from hybrid_sleep.registration import register_with_peft
from hybrid_sleep.sleep.checkpointing import Checkpointing
from hybrid_sleep.sleep.options import Passes, SleepOptions
from hybrid_sleep.sleep.weights import Owner, bump_version, weights_version
from hybrid_sleep.support.io import write_text_atomic

_REMOTE_FILE = "modeling_hybrid_sleep.py"
_REMOTE_CODE = '''"""Lets transformers load this checkpoint with trust_remote_code=True."""

from hybrid_sleep import HybridSleepConfig, HybridSleepForCausalLM, HybridSleepModel

__all__ = ["HybridSleepConfig", "HybridSleepForCausalLM", "HybridSleepModel"]
'''


class HybridSleepPreTrainedModel(PreTrainedModel):
    """A PreTrainedModel whose checkpoints find this package and whose caches know their owner."""

    config_class = HybridSleepConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]

    def __init__(self, config: HybridSleepConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        register_with_peft()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StateSpaceMixer):
            module.init_own_weights()
        own, others = self.config.embedding_initializer_range, self.config.initializer_range
        if isinstance(module, CompoundEmbedding) or (
            isinstance(module, nn.Embedding) and own != others
        ):
            init.normal_(module.weight, std=own)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """As transformers'. With `token_fields` ValueError for another size: ids would change
        their digits, and so what they mean."""
        fields, size = self.config.token_fields, self.config.vocab_size
        if fields is None:
            return super().resize_token_embeddings(
                new_num_tokens, pad_to_multiple_of, mean_resizing
            )
        if pad_to_multiple_of is not None or new_num_tokens not in (None, size):
            raise ValueError(
                f"new_num_tokens must be None or {size}, and pad_to_multiple_of None, where ids "
                f"have digits of token_fields={fields}, which another size would change, got "
                f"{new_num_tokens!r} and {pad_to_multiple_of!r}"
            )
        return self.get_input_embeddings()

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Does nothing. Loading with trust_remote_code calls it, and then saving would copy this
        module without its package and overwrite auto_map; `save_pretrained` names the package."""

    def save_pretrained(
        self, save_directory: str | os.PathLike[Any], *args: Any, **kwargs: Any
    ) -> None:
        """As transformers', plus a file by which AutoModel finds this package (auto_map)."""
        module = _REMOTE_FILE.removesuffix(".py")
        self.config.auto_map = {
            "AutoConfig": f"{module}.HybridSleepConfig",
            "AutoModel": f"{module}.HybridSleepModel",
            "AutoModelForCausalLM": f"{module}.HybridSleepForCausalLM",
        }
        super().save_pretrained(save_directory, *args, **kwargs)
        write_text_atomic(f"{save_directory}/{_REMOTE_FILE}", _REMOTE_CODE)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
        **others: Any,
    ) -> None:
        """Recompute in the backward: `set_activation_checkpointing("block")`, or as it is set.

        transformers' own would drop the fast weights between windows. Trainer, trl and peft call
        this, as `activation_checkpointing_enable()`.

        gradient_checkpointing_kwargs: of torch's `checkpoint`, `use_reentrant` and
        `preserve_rng_state` are taken and change nothing: recomputation is never reentrant, keeps
        the state of random numbers, and gives the same gradients. Raises ValueError for others,
        for every_n_layers other than 1, for offload and for any other argument.
        """
        given = gradient_checkpointing_kwargs or {}
        unknown = set(given) - {"use_reentrant", "preserve_rng_state"}
        refused = {name: given[name] for name in sorted(unknown)} | others
        refused |= {} if every_n_layers == 1 else {"every_n_layers": every_n_layers}
        refused |= {"offload": offload} if offload else {}
        if refused:
            raise ValueError(
                f"activation checkpointing does not take "
                f"{', '.join(f'{name}={value!r}' for name, value in refused.items())}: the model "
                "recomputes its own way, with the fast weights that windows hand on. Choose what "
                "is recomputed with model.set_activation_checkpointing('block', a number of "
                "layers, 'pass', 'window')"
            )
        base: Any = self.base_model
        if base.checkpointing == Checkpointing():
            base.checkpointing = Checkpointing(group=1)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations: `set_activation_checkpointing(None)`."""
        base: Any = self.base_model
        base.checkpointing = Checkpointing()

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether anything is recomputed in the backward."""
        return self.base_model.checkpointing != Checkpointing()

    @property
    def input_device(self) -> torch.device:
        """Where embeddings are computed; unlike `device` also for weights that are offloaded."""
        hook = getattr(self.get_input_embeddings(), "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        return self.device if device is None else torch.device(device)

    @property
    def weights_version(self) -> int:
        """Grows with every change of the slow weights; a cache serves one version."""
        return weights_version(self)

    def bump_weights_version(self) -> int:
        """Count a change of the slow weights, durably (it is saved with the config)."""
        return bump_version(self)

    def memory_owner(self) -> Owner:
        """This model as it is now, for a cache to belong to."""
        return Owner.of(self)

    @property
    def options(self) -> SleepOptions:
        """When and how the model sleeps, as its config says now."""
        return self.config.sleep_options

    def check_passes(self, passes: Any, name: str = "passes") -> Passes:
        """Return `passes` if a sleep of this model can be that deep, else raise ValueError."""
        return self.config.check_passes(passes, name)

    def architecture(self) -> dict[str, Any]:
        """The fields of the config that give a cache its meaning, as plain JSON data."""
        return self.config.architecture()
