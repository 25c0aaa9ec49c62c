"""What the documents list is what there is: settings, metrics, admin routes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serving.metrics import Metrics
from serving.policy import Policy
from serving.routes import admin
from serving.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"


def table(page: str, section: str = "") -> dict[str, list[str]]:
    """The rows of a page's tables by their first cell, from ``section`` on."""
    text = (DOCS / page).read_text(encoding="utf-8")
    text = text[text.index(section) :]
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.MULTILINE)
    return {name: rest.split(" | ") for name, rest in rows}


@pytest.mark.parametrize(("model", "section"), [(Settings, "# Settings"), (Policy, "## Policy")])
def test_every_setting_is_documented_with_its_default_and_meaning(model, section):
    listed = table("settings.md", section)
    fields = model.model_fields
    assert set(listed) == (set(fields) | set(Policy.model_fields) if model is Settings else set(fields))
    for name, field in fields.items():
        assert listed[name][-1] == field.description
        if name != "policy" and not field.is_required():
            assert listed[name][0] == ("none" if field.default is None else f"`{field.default}`")


def test_every_metric_is_documented_with_its_type_and_labels():
    metrics = Metrics()
    there = {}
    for metric in vars(metrics).values():
        if hasattr(metric, "_labelnames"):
            name = metric._name + ("_total" if metric._type == "counter" else "")
            there[name] = (metric._type, ", ".join(f"`{label}`" for label in metric._labelnames) or "none")
    listed = {name: tuple(rest[:2]) for name, rest in table("metrics.md").items()}
    assert listed == there


def test_every_admin_route_is_documented_with_the_role_it_needs():
    there = {f"{method} {path}" for method, path in _routes()}
    listed = {name for name in table("admin.md", "## Routes") if "/admin" in name}
    assert {re.sub(r":path", "", name) for name in there} == listed


def _routes():
    for part in (admin.adapters, admin.cases, admin.repairs, admin.keys, admin.audit):
        for route in part.router.routes:
            for method in route.methods:
                yield method, f"/admin{route.path}"
