"""Settings from file, environment and arguments; what is wrong is refused by name."""

from __future__ import annotations

import pytest

from serving.settings import SettingsError, load_settings


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "headguard.toml"
    path.write_text('model = "m"\nport = 1\n[policy]\nmode = "reroute"\nwindow = 8\n')
    return path


def test_arguments_win_over_environment_and_environment_over_file(file, monkeypatch):
    assert load_settings(file).port == 1
    monkeypatch.setenv("HEADGUARD_PORT", "2")
    monkeypatch.setenv("HEADGUARD_POLICY__ALPHA", "0.2")
    assert load_settings(file).port == 2
    assert load_settings(file).policy.alpha == 0.2
    assert load_settings(file).policy.window == 8
    assert load_settings(file, port=3, host=None).port == 3


@pytest.mark.parametrize("line", ["prt = 1", "port = 70000", 'evidence = "all"', "port ==", "[policy]\nwindw = 1"])
def test_what_is_unknown_or_wrong_is_refused(tmp_path, line):
    path = tmp_path / "wrong.toml"
    path.write_text(f'model = "m"\n{line}\n')
    with pytest.raises(SettingsError):
        load_settings(path)


def test_an_unknown_variable_of_ours_is_refused(file, monkeypatch):
    monkeypatch.setenv("HEADGUARD_EVIDENC", "none")
    with pytest.raises(SettingsError, match="HEADGUARD_EVIDENC"):
        load_settings(file)


def test_auth_off_is_for_loopback_only(file):
    assert load_settings(file, auth="off").auth == "off"
    with pytest.raises(SettingsError, match="loopback"):
        load_settings(file, auth="off", host="0.0.0.0")


def test_the_password_of_the_database_is_never_printed(file):
    settings = load_settings(file, database_url="postgresql+psycopg://u:hunter2@h/d")
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings.model_dump())
    assert "hunter2" in settings.database
