"""Bad input, each with a clear error of the 4xx kind, and nothing of it kept."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

ASK = {"model": "support", "messages": [{"role": "user", "content": "hello there my friend and others too"}]}


def refused(response, status: int, code: str, *words: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), response.text
    assert all(word in error["message"] for word in words), error["message"]


def post(house, body=None, path="/v1/chat/completions", role="client", **kwargs):
    return house.call(role, "POST", path, **({"json": body} if body is not None else {}), **kwargs)


def test_requests_that_are_not_what_the_api_takes(live):
    refused(post(live, content=b'{"model": '), 400, "malformed_json")
    refused(post(live, content=b"[1]"), 400, "malformed_json")
    refused(post(live, content=b'{"model": "support", "temperature": NaN}'), 400, "malformed_json", "NaN")
    refused(post(live, content=b"[" * 100_000), 400, "malformed_json")
    refused(post(live, {**ASK, "model": "nobody"}), 404, "model_not_found", "nobody", "support")
    refused(post(live, {**ASK, "model": live.gateway.aliases.route("support").revision}), 404, "model_not_found")
    refused(post(live, {"model": "support"}), 400, "invalid_request", "messages")
    refused(post(live, {**ASK, "n": 2}), 400, "invalid_request", "one by one")
    refused(post(live, {"model": "support", "prompt": ["a", "b"]}, "/v1/completions"), 400, "invalid_request")
    long = {**ASK, "messages": [{"role": "user", "content": "word " * 5000}]}
    refused(post(live, long), 400, "context_length_exceeded")
    refused(post(live, {**long, "stream": True}), 400, "context_length_exceeded")
    refused(live.call("client", "GET", "/v1/nothing"), 404, "not_found")


def test_a_body_that_is_too_large_is_refused_announced_or_not(live):
    size = live.gateway.settings.max_body_bytes + 1
    refused(post(live, content=b"x" * size), 413, "body_too_large")
    refused(post(live, content=(b"x" * 2**16 for _ in range(size // 2**16 + 1))), 413, "body_too_large")


@pytest.mark.parametrize("field", ["guard", "headguard", "guard_mode", "Guard"])
def test_a_client_cannot_speak_to_the_guard(live, field):
    refused(post(live, {**ASK, field: {"mode": "observe"}}), 400, "guard_field_refused", field)
    refused(post(live, {**ASK, "vllm_xargs": {field: 1}}), 400, "guard_field_refused", field)
    refused(post(live, ASK, headers={"x-headguard-mode": "off"}), 400, "guard_field_refused")


def test_keys_and_roles(live):
    refused(post(live, ASK, role=None), 401, "missing_api_key")
    refused(post(live, ASK, role=None, headers={"authorization": "Bearer hg_wrong"}), 401, "invalid_api_key")
    for role in ("client", "viewer", "approver"):
        swap = live.call(role, "POST", "/admin/adapters/support/swap", json={"revision": "x"})
        refused(swap, 403, "forbidden", "operator", role)
    refused(live.call("client", "GET", "/admin/cases"), 403, "forbidden", "viewer")
    refused(live.call("operator", "POST", "/admin/repairs/x/approve"), 403, "forbidden", "approver")
    refused(live.call("operator", "POST", "/admin/keys", json={"owner": "me", "role": "approver"}), 403, "forbidden")
    refused(live.call("approver", "POST", "/admin/keys", json={"owner": "me", "role": "approver"}), 403, "forbidden")


def test_a_revoked_key_is_not_known_any_more(live):
    made = live.ok("operator", "POST", "/admin/keys", json={"owner": "bob", "role": "client"})
    bob = {"authorization": f"Bearer {made['key']}"}
    assert post(live, ASK, role=None, headers=bob).status_code == 200
    live.ok("operator", "DELETE", f"/admin/keys/{made['id']}")
    refused(post(live, ASK, role=None, headers=bob), 401, "invalid_api_key")
    assert made["key"] not in json.dumps(live.ok("viewer", "GET", "/admin/keys"))


def upload(house, alias, folder):
    files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    return house.call("operator", "POST", f"/admin/adapters/{alias}/revisions", files=files)


@pytest.fixture
def copy(weights, tmp_path):
    """A copy of an adapter that a test may spoil."""
    return shutil.copytree(weights.first, tmp_path / "copy")


def test_adapters_that_must_not_be_loaded(house, copy):
    weights = copy / "adapter_model.safetensors"
    good = weights.read_bytes()
    tensors = load_file(weights)

    (copy / "adapter_model.bin").write_bytes(b"\x80\x04pickle")
    refused(upload(house, "support", copy), 400, "adapter_rejected", "pickle")
    (copy / "adapter_model.bin").unlink()

    name = next(iter(tensors))
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, weights)
    refused(upload(house, "support", copy), 400, "adapter_rejected", "NaN")

    save_file(tensors, weights, metadata={"headguard.base_digest": "f" * 64})
    refused(upload(house, "support", copy), 400, "adapter_rejected", "another base")

    weights.write_bytes(good[:100])
    refused(upload(house, "support", copy), 400, "adapter_rejected", "safetensors")
    weights.unlink()
    refused(upload(house, "support", copy), 400, "adapter_rejected", "missing")
    assert [a["alias"] for a in house.ok("viewer", "GET", "/admin/adapters")["adapters"]] == ["base"]
    assert not list(house.gateway.registry.incoming.iterdir())


@pytest.mark.parametrize("alias", ["..%2F..%2Fetc", "%2e%2e", "Support", "a b", "-x", "x" * 64])
def test_a_name_that_is_not_a_name_is_refused(house, weights, alias):
    response = upload(house, alias, weights.first)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["../adapter_config.json", "/etc/passwd", "a/b.json", "..\\x", "run.py"])
def test_a_file_name_that_is_a_path_or_does_not_belong_is_refused(house, name):
    response = house.call("operator", "POST", "/admin/adapters/support/revisions", files=[("files", (name, b"x"))])
    refused(response, 400, "adapter_rejected")


def test_the_name_of_the_base_cannot_be_taken(house, weights):
    refused(upload(house, "base", weights.first), 409, "conflict", "base model")


def test_profiles_that_do_not_belong(house, weights):
    revision = house.upload("support", weights.first)["revision"]

    def put(content):
        return house.call("operator", "PUT", f"/admin/revisions/{revision}/profile", content=content)

    refused(put(weights.profiles["second"].read_bytes()), 409, "profile_mismatch", "adapter")
    refused(put(weights.profiles["base"].read_bytes()), 409, "profile_mismatch", "adapter")
    refused(put(b"not a profile"), 409, "profile_mismatch")
    refused(house.call("operator", "PUT", "/admin/revisions/x@sha256-000000000000/profile"), 404, "revision_not_found")


def test_an_alpha_finer_than_the_calibration_supports_names_the_smallest_one(live):
    response = live.call("operator", "PUT", "/admin/adapters/support/policy", json={"alpha": 1e-6})
    smallest = next(r["smallest_alpha"] for r in live.ok("viewer", "GET", "/admin/adapters/support")["revisions"])
    refused(response, 400, "alpha_too_fine", f"{smallest:.4g}")


def test_a_policy_with_an_unknown_field_is_refused(live):
    response = live.call("operator", "PUT", "/admin/adapters/support/policy", json={"mode": "block", "windw": 3})
    refused(response, 400, "invalid_policy", "windw")
