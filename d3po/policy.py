"""What is trained, and what it is compared with.

A policy makes the denoiser of a family trainable, as LoRA or in full, in float32 whatever the base
is stored in, and remembers the reference: under LoRA that is the network with its adapter off, in
full training a copy of the first weights kept in CPU memory and swapped in while it is needed.
Loading trained weights never moves the reference, and `fingerprint` tells one reference from
another, so that a resumed run can prove that it is compared with what it was compared with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from d3po.sharding import gathered, holding, local, piece_of, shard
from fifa.config import Config, InputError, atomic_path

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh

    from d3po.families import Family

_ADAPTER = "default"


class PolicyConfig(Config):
    """What to train."""

    method: Literal["lora", "full"] = Field(
        "lora", description="Train low-rank adapters (lora) or every weight of the denoiser (full)."
    )
    rank: int = Field(4, ge=1, description="Rank of the LoRA matrices; published D3PO uses 4.")
    alpha: int | None = Field(
        None, ge=1, description="LoRA update is scaled by alpha / rank; null means alpha = rank."
    )
    targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description="Layers that get an adapter, by how their names end; default: all attention.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the LoRA initialisation.")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay per optimizer step of the average of the weights; null keeps none.",
    )


class Policy:
    """The trainable denoiser of `family` and its reference.

    `bare` is the network itself. `denoiser` is what to call: it starts as `bare` and is to be set
    to whatever `accelerator.prepare(policy.bare)` returns; both share their weights, so adapters,
    references and averages take effect through the wrapper. A family carries one policy at most.

    On a `mesh` of processes the network is cut up among them (see sharding): then `state_dict`,
    `saver` and every forward pass are for all processes together.
    """

    def __init__(
        self, family: Family, config: PolicyConfig, mesh: DeviceMesh | None = None
    ) -> None:
        self.family = family
        self.config = config
        self.mesh = mesh
        self.bare: Any = family.denoiser
        self.denoiser: nn.Module = family.denoiser
        self._stored: dict[str, Tensor] = {}  # the reference's own copy, full training only
        self._fingerprint: str | None = None
        if config.method == "lora":
            self._attach_lora()
        else:
            self._stored = {n: p.detach().clone().cpu() for n, p in self.bare.named_parameters()}
            self.bare.float().requires_grad_(True)
        self._trained = self._with_gradient()
        if mesh is not None:
            self._cut_up(mesh)
        self._ema: dict[str, Tensor] = {}
        self._ema_updates = 0
        self._restart_ema()

    def _attach_lora(self) -> None:
        import torch
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = self.config
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha or config.rank,
            target_modules=list(config.targets),
            init_lora_weights="gaussian",
        )
        # peft draws from torch's CPU generator: lend it a seeded one, then put the old state back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            try:
                self.bare.add_adapter(lora, _ADAPTER)
            except ValueError as error:
                raise InputError(f"cannot add LoRA to {self.family.name}: {error}") from error
        for p in self.bare.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        self._lora_layers = [m for m in self.bare.modules() if isinstance(m, BaseTunerLayer)]

    def _with_gradient(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.bare.named_parameters() if p.requires_grad}

    def _cut_up(self, mesh: DeviceMesh) -> None:
        self.fingerprint()  # now, while the weights are whole
        self._network = type(self.bare)  # sharding makes it another class
        shard(self.bare, mesh)
        self._trained = self._with_gradient()
        if self.config.method == "full":
            self._stored = {name: local(p).clone().cpu() for name, p in self._trained.items()}

    # ---- weights --------------------------------------------------------------------------------

    def trainable(self) -> list[nn.Parameter]:
        """The parameters to hand to an optimizer, float32, in a fixed order."""
        return list(self._trained.values())

    def state_dict(self) -> dict[str, Tensor]:
        """All a resume needs: the live trained weights by name, the average as `ema.<name>`.

        On a mesh: whole tensors, for the first process only.
        """
        return gathered(self._state(), self.mesh)

    def _state(self) -> dict[str, Tensor]:
        import torch

        state = {name: p.detach() for name, p in self._trained.items()}
        if self._ema:
            state |= {f"ema.{name}": tensor for name, tensor in self._ema.items()}
            state["ema_updates"] = torch.tensor(self._ema_updates)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back exactly what `state_dict` gave; InputError if that was another policy's."""
        own = self._state()
        _check_shapes("the stored policy", state, own)
        for name, tensor in own.items():
            local(tensor).copy_(local(piece_of(state[name], like=tensor)))
        if self._ema:
            self._ema_updates = int(state["ema_updates"])

    # ---- the reference --------------------------------------------------------------------------

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside the block the denoiser is the reference, without gradients; then itself again.

        Restored also when the block raises. Whole weights are swapped by pointer, never
        overwritten, so a backward pass may lie on either side of the block; full training needs
        room for one more copy of the weights (on a mesh: of the pieces) on the device meanwhile.
        """
        import torch

        full = self.config.method == "full"
        as_reference = self._swapped(self._stored) if full else self._adapter_off()
        with torch.no_grad(), as_reference:
            yield

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        switched = [layer for layer in self._lora_layers if not layer.disable_adapters]
        try:
            for layer in switched:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in switched:
                layer.enable_adapters(True)

    @contextmanager
    def _swapped(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        if self.mesh is not None:
            with holding(self._trained, tensors):
                yield
            return
        own = {name: p.data for name, p in self._trained.items()}
        try:
            for name, p in self._trained.items():
                p.data = tensors[name].to(p)
            yield
        finally:
            for name, p in self._trained.items():
                p.data = own[name]

    def fingerprint(self) -> str:
        """16 hex digits (BLAKE2b) of the reference's weights: names, dtypes, shapes, values.

        The same base gives the same digits under LoRA and full training, before and after
        training, in any process. Computed once: the reference never changes.
        """
        if self._fingerprint is None:
            self._fingerprint = _digest(self._reference_weights())
        return self._fingerprint

    def _reference_weights(self) -> dict[str, Tensor]:
        if self.config.method == "full":
            return self._stored
        # peft moves an adapted layer's own weights one level down.
        return {
            name.replace(".base_layer.", "."): p
            for name, p in self.bare.named_parameters()
            if name not in self._trained
        }

    # ---- the average ----------------------------------------------------------------------------

    def ema_update(self) -> None:
        """Move the average towards the weights, after an optimizer step; without EMA do nothing.

        The n-th update uses decay min(ema_decay, (1 + n) / (10 + n)), which forgets the start
        quickly.
        """
        if self.config.ema_decay is None:
            return
        decay = min(self.config.ema_decay, (1 + self._ema_updates) / (10 + self._ema_updates))
        for name, average in self._ema.items():
            average.lerp_(self._trained[name].detach(), 1 - decay)
        self._ema_updates += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the policy has its averaged weights (without EMA, its own)."""
        with self._swapped(self._ema) if self._ema else nullcontext():
            yield

    def _restart_ema(self) -> None:
        if self.config.ema_decay is not None:
            self._ema = {name: p.detach().clone() for name, p in self._trained.items()}
            self._ema_updates = 0

    # ---- files ----------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write what diffusers loads: `pytorch_lora_weights.safetensors`, or the denoiser's folder.

        LoRA: `pipe.load_lora_weights(folder)` reproduces this policy, alpha included. Full: the
        folder `unet` in diffusers' layout, which must not exist yet. For the averaged weights,
        call it inside `averaged()`.
        """
        self.saver()(folder)

    def saver(self) -> Callable[[str | Path], None]:
        """`save` of the weights as they are now, for one process; taking them is for all."""
        if self.config.method == "lora":
            weights = gathered(self._lora_weights(), self.mesh)
        else:
            weights = {} if self.mesh is None else gathered(self.bare.state_dict(), self.mesh)

        def save(folder: str | Path) -> None:
            from safetensors import SafetensorError

            folder = Path(folder)
            try:
                if self.config.method == "lora":
                    self.family.save_lora(folder, weights, self._lora_metadata())
                else:
                    with atomic_path(folder / self.family.denoiser_folder) as path:
                        self._whole_network(weights).save_pretrained(path)
            except SafetensorError as error:  # how safetensors reports a full disk
                raise InputError(f"cannot write the weights to {folder}: {error}") from error

        return save

    def _whole_network(self, weights: Mapping[str, Tensor]) -> Any:
        """The network with these weights; the bare one where it is whole itself."""
        if self.mesh is None:
            return self.bare
        import torch

        with torch.device("meta"):
            network: Any = self._network.from_config(self.bare.config)
        network.load_state_dict(weights, assign=True)
        return network

    def load(self, folder: str | Path) -> None:
        """Take the trained weights from a folder that `save` wrote; the average starts from them.

        The reference stays what it was. Raises InputError if the folder holds something else. Not
        for a network in pieces: those are resumed by `load_state_dict`.
        """
        if self.mesh is not None:
            raise ValueError("a network in pieces takes weights by load_state_dict")
        folder = Path(folder)
        if self.config.method == "lora":
            self._load_lora(folder)
        else:
            self._load_full(folder / self.family.denoiser_folder)
        self._restart_ema()

    def _lora_weights(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        weights: dict[str, Tensor] = get_peft_model_state_dict(self.bare, adapter_name=_ADAPTER)
        return weights

    def _lora_metadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = self.bare.peft_config[_ADAPTER].to_dict()
        return metadata

    def _load_lora(self, folder: Path) -> None:
        from peft import set_peft_model_state_dict

        weights, metadata = self.family.load_lora(folder)
        own = self._lora_metadata()
        for key in ("r", "lora_alpha"):
            if metadata.get(key, own[key]) != own[key]:
                raise InputError(
                    f"the LoRA in {folder} has {key} {metadata[key]}, this policy has {own[key]}"
                )
        _check_shapes(f"the LoRA in {folder}", weights, self._lora_weights())
        set_peft_model_state_dict(self.bare, weights, adapter_name=_ADAPTER)

    def _load_full(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder} to load weights from")
        try:
            weights = type(self.bare).from_pretrained(folder).state_dict()
        except OSError as error:
            raise InputError(f"{folder} holds no readable model") from error
        _check_shapes(f"the model in {folder}", weights, self.bare.state_dict())
        self.bare.load_state_dict(weights)


def _check_shapes(what: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name in sorted(given.keys() | own.keys()):
        if name not in given or name not in own:
            side = "lacks" if name in own else "also has"
            raise InputError(f"{what} does not fit this policy: it {side} '{name}'")
        if given[name].shape != own[name].shape:
            raise InputError(
                f"{what} does not fit this policy: '{name}' is {tuple(given[name].shape)},"
                f" expected {tuple(own[name].shape)}"
            )


def _digest(weights: Mapping[str, Tensor]) -> str:
    import torch

    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        tensor = weights[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
