"""Code of others runs when its package is installed, and this site has allowed it by name; not before, and from nowhere else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mpc_fl.config.loading import load_config
from mpc_fl.errors import ConfigError
from mpc_fl.installed_code import Package, is_reference, load_entry_point, load_function, loaders, package_of
from tests.support.installed_package import install

LEAVES_A_MARK = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\ndef load(*_): return 7\n"


def ran(place: Path, name: str) -> bool:
    return (place / f"{name}.ran").exists()


def test_nothing_of_a_package_runs_before_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site", "marked_one", LEAVES_A_MARK, "2.5", loader="ours"))
    assert package_of("marked_one:load") == Package("marked-one", "2.5")
    assert loaders("mpc_fl.loaders")["ours"] == [Package("marked-one", "2.5")]
    for refused in (
        lambda: load_function("marked_one:load", ["another"]),
        lambda: load_entry_point("mpc_fl.loaders", "ours", ()),
    ):
        with pytest.raises(
            ConfigError, match=r"code of the package marked-one 2.5, which this site does not allow: if you trust"
        ):
            refused()
    assert not ran(tmp_path / "site", "marked_one") and "marked_one" not in sys.modules
    function, package = load_entry_point("mpc_fl.loaders", "ours", ["Marked.One"])
    assert function() == 7 and str(package) == "marked-one 2.5" and ran(tmp_path / "site", "marked_one")


def test_a_file_in_the_current_directory_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with metadata beside it nor in the place of a package that is installed elsewhere."""
    install(tmp_path / "here", "marked_two", LEAVES_A_MARK, loader="theirs")
    install(tmp_path / "here", "marked_three", LEAVES_A_MARK)
    monkeypatch.syspath_prepend(install(tmp_path / "site", "marked_three", LEAVES_A_MARK))
    monkeypatch.syspath_prepend(tmp_path / "here")  # as `python -m mpc_fl` has it
    monkeypatch.chdir(tmp_path / "here")
    for name in ("marked_two", "marked_three"):
        with pytest.raises(ConfigError, match=f"no installed package has a module '{name}'"):
            load_function(f"{name}:load", ["marked-two", "marked-three"])
    with pytest.raises(ConfigError, match="announced by no installed package"):
        load_entry_point("mpc_fl.loaders", "theirs", ["marked-two"])
    assert not list(tmp_path.rglob("*.ran"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "here"))  # said explicitly
    assert load_function("marked_two:load", ["marked-two"])[0]() == 7


def test_names_that_two_packages_announce_are_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("marked_four", "marked_five"):
        monkeypatch.syspath_prepend(install(tmp_path / name, name, LEAVES_A_MARK, loader="same"))
    with pytest.raises(ConfigError, match="'same' is announced by marked-five 1.0, marked-four 1.0"):
        load_entry_point("mpc_fl.loaders", "same", ["marked-four", "marked-five"])


@pytest.mark.parametrize(
    ("source", "said"),
    [("import nowhere_at_all\n", "'broken_BROKEN' cannot be imported: it lacks 'nowhere_at_all'"),
     ("1 / 0\n", "'broken_BROKEN' raised ZeroDivisionError when imported"), ("load = 3\n", "has no function 'load' there")],
)  # fmt: skip
def test_a_broken_package_is_one_line(source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"broken_{len(source)}"
    monkeypatch.syspath_prepend(install(tmp_path, name, source))
    with pytest.raises(ConfigError) as refused:
        load_function(f"{name}:load", [name])
    assert said.replace("broken_BROKEN", name) in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_a_reference() -> None:
    assert is_reference("package.module:function") and is_reference("package:f")
    for text in ("resnet18", "package.module", "package:f.g", ".package:f", "os:system('x')", "a b:c", "package:"):
        assert not is_reference(text)


def test_a_file_allows_nothing_and_a_saved_configuration_keeps_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "federation.yaml"
    path.write_text("site: {allow_packages: [theirs]}")
    with pytest.raises(
        ConfigError, match="a file could come from them: remove it there; give --set site.allow_packages"
    ):
        load_config(path)
    path.write_text("name: theirs")
    config = load_config(path, ["site.allow_packages=[theirs]"])
    assert config.site.allow_packages == ("theirs",) and config.digest() == load_config(path).digest()
    path.write_text(config.to_yaml())
    assert load_config(path).site.allow_packages == ()


def test_a_file_sends_this_sites_own_numbers_nowhere(tmp_path: Path) -> None:
    """Metrics of a hospital carry no noise; whoever writes its configuration is not to get them."""
    path = tmp_path / "federation.yaml"
    path.write_text("site: {watch: [mlflow], mlflow_uri: 'https://theirs'}")
    with pytest.raises(ConfigError, match=r"without noise, .*: remove it there; give --set site\.mlflow_uri=URI"):
        load_config(path)
    path.write_text("site: {watch: [mlflow]}")
    config = load_config(path, ["site.mlflow_uri=https://ours"])
    assert config.site.mlflow_uri == "https://ours"
    path.write_text(config.to_yaml())
    assert load_config(path).site.mlflow_uri is None
