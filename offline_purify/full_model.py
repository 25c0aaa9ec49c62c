"""A whole model as the patient: no adapter to take off, and no base to fall back to.

What changes are the weights and biases of all attention and MLP projections, in fp32 (a copy of them is kept by every
``state``, as large as the model); embeddings, norms and the output head stay. A trusted reference is optional: another
model folder, or an adapter over the suspicious model, held beside it as a second frozen model. Without one nobody
trusted answers: flags are set against the suspect's own answers without the trigger (`offline_purify.standin`), and
what needs a second model says so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer

from guard.adapters import inspect_adapter
from guard.errors import NoReference, UnsupportedModel
from guard.identity import ADAPTER_CONFIG, base_digest
from offline_purify.heads.layout import HeadLayout
from offline_purify.signature.suppress import Start, suppress_model, suppress_model_heads
from offline_purify.suspect import Suspect, Weights, check_repairable, frozen, load_model, unquantised_config

_INDEX = "model.safetensors.index.json"


class FullModel(Suspect):
    """A suspicious model in memory; its projections are what the stages change."""

    setting: Weights = "full"

    def __init__(
        self, model: Any, tokenizer: Any, layout: HeadLayout, model_dir: Path, trusted: Any | None = None
    ) -> None:
        super().__init__(model, tokenizer, layout)
        self.model_dir, self._trusted = model_dir, trusted
        self.target_modules = tuple(path.rpartition(".")[2] for path, _ in layout.family.modules)

    @property
    def has_reference(self) -> bool:
        """Whether a reference was given."""
        return self._trusted is not None

    @property
    def deviation(self) -> float:
        """Standard deviation that the architecture's weights begin with."""
        return float(getattr(self.model.config, "initializer_range", 0.02))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Weights and biases of all projections by parameter name."""
        return {n: p for n, p in self.model.named_parameters() if self.layout.family.layer(n) is not None}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within: the reference answers. Raises NoReference where none was given."""
        if self._trusted is None:
            raise NoReference(
                f"{self.model_dir} is a whole model and came without a trusted one: name a reference folder."
            )
        own, self.model = self.model, self._trusted
        try:
            yield
        finally:
            self.model = own

    def suppress_channels(self, mask: Tensor, start: Start = "xavier", seed: int = 0) -> dict[str, int]:
        """Start the channels again (`Start`)."""
        return suppress_model(self.parameters(), mask, start, seed, self.deviation, self.layout.family)

    def suppress_heads(self, mask: Tensor, start: Start = "xavier", seed: int = 0) -> dict[str, int]:
        """Start the heads again (`Start`); shared keys and values only where the whole group is in ``mask``."""
        return suppress_model_heads(self.parameters(), self.layout, mask, start, seed, self.deviation)

    def save(self, folder: Path) -> None:
        """Write the model as a folder with the input's tokenizer, fp32."""
        _write(self.model, self.tokenizer, Path(folder))


def check_model(model: Path, reference: Path | None = None) -> HeadLayout:
    """Head layout of a whole model that can be repaired, and compared with the reference if one is given; loads no
    weights.

    Raises UnsupportedModel or AdapterRejected naming what is in the way.
    """
    model = Path(model)
    layout = check_repairable(model)
    digest, vocabulary = _complete(model), _tokenizer(model).get_vocab()
    if reference is None:
        return layout
    reference = Path(reference)
    if is_adapter(reference):
        inspect_adapter(reference, model)
        return layout
    unquantised_config(reference)
    if _complete(reference) == digest:
        raise UnsupportedModel(f"{reference} is the suspicious model itself: expected another one, which is trusted.")
    if _tokenizer(reference).get_vocab() != vocabulary:
        raise UnsupportedModel(f"{reference} has another vocabulary than {model}: expected a reference of its kind.")
    return layout


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and not a model."""
    return (folder / ADAPTER_CONFIG).is_file()


def open_model(model: Path, reference: Path | None = None, device: str = "cpu") -> FullModel:
    """Load a whole model (and the trusted one, if a folder of a model or of an adapter over ``model`` is given).

    Raises UnsupportedModel or AdapterRejected, before anything is loaded, for what cannot be repaired or compared.
    """
    model = Path(model)
    layout = check_model(model, reference)
    trusted = _reference(model, Path(reference)).to(device) if reference is not None else None
    suspect = FullModel(load_model(model).to(device), _tokenizer(model), layout, model, trusted)
    if not suspect.parameters():
        raise UnsupportedModel(f"{model} has no projection that is called as in {layout.family.name}.")
    return suspect


def merge_adapter(base: Path, adapter: Path, folder: Path) -> None:
    """Write the base with the adapter merged into its weights as a model folder, fp32.

    Raises UnsupportedModel or AdapterRejected, before anything is loaded, for what cannot be repaired.
    """
    check_repairable(base)
    inspect_adapter(adapter, base)
    _write(_merged(base, adapter), _tokenizer(base), Path(folder))


def _merged(base: Path, adapter: Path) -> Any:
    peft: Any = PeftModel.from_pretrained(load_model(base), str(adapter))
    return frozen(peft.merge_and_unload())


def _reference(model: Path, reference: Path) -> Any:
    """The trusted model: a folder's own, or the suspicious model as it came with an adapter merged in."""
    return _merged(model, reference) if is_adapter(reference) else load_model(reference)


def _complete(folder: Path) -> str:
    """Digest of a model folder in safetensors form, none of whose shards is missing. Raises UnsupportedModel."""
    digest = base_digest(folder)
    if (folder / _INDEX).is_file():
        try:
            named = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnsupportedModel(f"{folder}: {_INDEX} cannot be read: {error}") from error
        if missing := sorted(name for name in named if not (folder / name).is_file()):
            raise UnsupportedModel(f"{folder} lacks {', '.join(missing)}, which {_INDEX} names.")
    return digest


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{folder} holds no tokenizer that can be read: {error}") from error


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
