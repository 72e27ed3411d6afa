"""`minillama4 doctor`: whatever is wrong gets its own line with what to do; what is only unusual is fine."""

import platform
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from minillama4 import cli
from minillama4.course import doctor
from minillama4.course.doctor import Finding

VERSION = metadata.version


def test_the_report_has_one_line_for_each_thing():
    report = doctor.report()
    assert [finding.name for finding in report] == [
        "Python",
        "packages",
        "threads",
        "GPU",
        "disk",
        "Jupyter",
        "browser",
    ]
    for finding in report:
        assert finding.text and len(str(finding).splitlines()) == 1
        assert str(finding).startswith("ok " if finding.ok else "TO DO ")


@pytest.mark.parametrize("ok, code", [(True, 0), (False, 1)])
def test_exit_code_says_whether_something_needs_doing(monkeypatch, capsys, ok, code):
    monkeypatch.setattr(doctor, "LOOKS", {"one": lambda: (True, "fine"), "two": lambda: (ok, "so so")})
    assert cli.main(["doctor"]) == code
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["ok", "one", "fine"],
        [*("ok" if ok else "TO DO").split(), "two", "so", "so"],
    ]


def test_a_look_that_fails_is_a_line_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(doctor, "LOOKS", {"one": lambda: 1 / 0, "two": lambda: (True, "fine")})
    assert doctor.report() == [
        Finding("one", False, "ZeroDivisionError: division by zero"),
        Finding("two", True, "fine"),
    ]


def test_it_runs_by_its_path_where_torch_is_missing():
    """`minillama4 doctor` imports the package, and that imports torch; so the file itself has to be enough."""
    code = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({doctor.__file__!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    assert len(done.stdout.splitlines()) == len(doctor.LOOKS) and "TO DO  threads" in done.stdout


@pytest.mark.parametrize("version, ok", [
    ("3.10.14", False), ("3.11.0", True), ("3.13.5", True), ("3.13.0+", True), ("3.14.0", False), ("3.14.0a1", False),
])  # fmt: skip
def test_python_outside_the_range_is_named_with_the_range(monkeypatch, version, ok):
    monkeypatch.setattr(platform, "python_version", lambda: version)
    assert doctor.python()[0] == ok
    assert ok or "3.11" in doctor.python()[1] and version in doctor.python()[1]


def installed(monkeypatch, **versions):
    """These packages have these versions, None for missing; all others whatever they have."""

    def version(name: str) -> str:
        if versions.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or (VERSION(name) if name not in AS_WISHED else AS_WISHED[name])

    monkeypatch.setattr(doctor.metadata, "requires", lambda _: REQUIRES)
    monkeypatch.setattr(doctor.metadata, "version", version)


REQUIRES = ["tqdm<5,>=4.66", "torch<2.14,>=2.11", "triton>=3.4; extra == 'gpu'", "nbval<0.12,>=0.11; extra == 'test'"]
AS_WISHED = {"tqdm": "4.70.1", "torch": "2.13.0+cpu", "nbval": "0.11.0"}


def test_packages_in_their_ranges_are_fine_and_the_gpu_extra_is_nobodys_duty(monkeypatch):
    installed(monkeypatch, triton=None)
    assert doctor.packages() == (True, "3, all in their ranges")


def test_missing_and_outdated_packages_are_named_with_the_command(monkeypatch):
    installed(monkeypatch, tqdm=None, torch="2.14.1")
    ok, text = doctor.packages()
    assert not ok and text.startswith("tqdm is missing, torch is 2.14.1: run `")
    assert f'{sys.executable} -m pip install "tqdm<5,>=4.66" "torch<2.14,>=2.11"`' in text and "nbval" not in text


def test_packages_of_the_tests_count_in_a_clone_only(monkeypatch, tmp_path):
    installed(monkeypatch, nbval=None)
    assert "nbval is missing" in doctor.packages()[1]
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    assert doctor.packages() == (True, "2, all in their ranges")


def test_more_threads_than_cores_is_named_with_the_remedy(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    ok, text = doctor.threads()
    assert not ok and "OMP_NUM_THREADS=" in text
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert doctor.threads()[0]


def test_a_gpu_is_named_and_none_is_fine(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ok, text = doctor.gpu()
    assert ok and text.startswith("none: everything in the course runs on the CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert doctor.gpu() == (True, "NVIDIA H100, 80 GiB")


@pytest.mark.parametrize("free, ok", [(2.5e9, True), (1.5e9, False)])
def test_a_full_disk_is_named(monkeypatch, free, ok):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(9e9, 9e9 - free, free))
    assert doctor.disk()[0] == ok and (ok or "1.5 GB" in doctor.disk()[1])


def test_a_kernel_of_another_python_is_named(monkeypatch, tmp_path):
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    def kernel(program):
        spec = SimpleNamespace(argv=[str(program)], resource_dir="its folder")
        monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda *_: spec)
        return doctor.jupyter()

    assert kernel("python")[0]  # jupyter_client then takes the Python that runs JupyterLab
    assert kernel(sys.executable)[0]
    ok, text = kernel(tmp_path / "bin" / "python")
    assert not ok and str(tmp_path) in text and "ipykernel install" in text

    def missing(*_):
        raise NoSuchKernel("python3")

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", missing)
    ok, text = doctor.jupyter()
    assert not ok and "no kernel python3" in text


def test_no_browser_is_fine(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert doctor.browser() == (True, "no Chromium: only needed for the browser tests")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"bin/{name}" if name == "google-chrome" else None)
    assert doctor.browser() == (True, str(Path("bin/google-chrome").as_posix()))
