"""A whole model as the patient: no adapter to take off, and no base to fall back to.

What changes are the weights and biases of all attention and MLP projections, in fp32 (a copy of them is kept by every
``state``, as large as the model); embeddings, norms and the output head stay. A trusted reference is optional: another
model folder, or an adapter over the suspicious model, held beside it as a second frozen model. Without one nobody
trusted answers: flags are set against the suspect's own answers without the trigger (`offline_purify.standin`), and
what needs a second model says so.
"""

from __future__ import annotations

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
from offline_purify.suspect import Suspect, Weights, check_repairable, frozen, load_model


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


def open_model(model: Path, reference: Path | None = None, device: str = "cpu") -> FullModel:
    """Load a whole model (and the trusted one, if a folder of a model or of an adapter over ``model`` is given).

    Raises UnsupportedModel or AdapterRejected, before anything is loaded, for what cannot be repaired or compared.
    """
    model = Path(model)
    layout = check_repairable(model)
    base_digest(model)  # refuses what is no model folder in safetensors form
    trusted = _reference(model, Path(reference)) if reference is not None else None
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    loaded = load_model(model).to(device)
    suspect = FullModel(loaded, tokenizer, layout, model, trusted.to(device) if trusted is not None else None)
    if not suspect.parameters():
        raise UnsupportedModel(f"{model} has no projection that is called as in {layout.family.name}.")
    return suspect


def merge_adapter(base: Path, adapter: Path, folder: Path) -> None:
    """Write the base with the adapter merged into its weights as a model folder, fp32.

    Raises UnsupportedModel or AdapterRejected, before anything is loaded, for what cannot be repaired.
    """
    check_repairable(base)
    inspect_adapter(adapter, base)
    _write(_merged(base, adapter), AutoTokenizer.from_pretrained(base, local_files_only=True), Path(folder))


def _merged(base: Path, adapter: Path) -> Any:
    peft: Any = PeftModel.from_pretrained(load_model(base), str(adapter))
    return frozen(peft.merge_and_unload())


def _reference(model: Path, reference: Path) -> Any:
    """The trusted model: a folder's own, or the suspicious model as it came with an adapter merged in."""
    if (reference / ADAPTER_CONFIG).is_file():
        inspect_adapter(reference, model)
        return _merged(model, reference)
    base_digest(reference)
    trusted = load_model(reference)
    ours = AutoTokenizer.from_pretrained(model, local_files_only=True).get_vocab()
    if AutoTokenizer.from_pretrained(reference, local_files_only=True).get_vocab() != ours:
        raise UnsupportedModel(f"{reference} has another vocabulary than {model}: expected a reference of its kind.")
    return trusted


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
