"""What is published: a source distribution that builds the wheel, and what their metadata say."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml
from conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""
APART = ("nbs/", "pages/", "tests/", "data/results/")


def built(kind: str, folder, out):
    "A distribution of the sources in a folder."
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "The wheel that is built from the source distribution, as an index would have it."
    folder = tmp_path_factory.mktemp("package")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in names.split():
        if not name.startswith(APART) and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    sdist = built("sdist", folder / "source", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return built("wheel", unpacked, folder)


def test_a_wheel_from_the_sources_is_installed_and_finds_its_data(published, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", tmp_path, published], check=True, capture_output=True)
    code = (
        "import sae_lora; from sae_lora.files import data_path; "
        "from sae_lora.cli import app; print(sae_lora.__file__, data_path('sae').is_dir())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        text=True,
        capture_output=True,
    )
    assert done.stdout.split() == [str(tmp_path / "sae_lora" / "__init__.py"), "True"], done.stderr


@pytest.fixture(scope="module")
def about(published):
    "The wheel's metadata."
    wheel = zipfile.ZipFile(published)
    (name,) = [n for n in wheel.namelist() if n.endswith("METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_an_index_shows_the_readme_with_links_that_lead_somewhere(about):
    text = about.get_payload()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 50 and all(t.startswith(("https://", "#")) for t in targets)
    (picture,) = re.findall(r"!\[[^\]]*\]\((\S+demo\.png)\)", text)
    assert picture.endswith("/raw/main/data/results/demo.png")


def test_metadata_are_whole(about):
    pythons = {c.rpartition(" ")[2] for c in about.get_all("Classifier") if re.search(r"3\.\d", c)}
    (tests,) = [yaml.safe_load(p.read_text()) for p in WORKFLOWS if p.stem == "tests"]
    assert pythons == set(tests["jobs"]["tests"]["strategy"]["matrix"]["python"])
    first, *_, last = sorted(pythons)
    limits = (ROOT / "pages" / "limitations.qmd").read_text()
    assert f"Python {first} to {last}" in limits and about["Requires-Python"] == f">={first}"
    needs = "\n".join(about.get_all("Requires-Dist"))
    lowest = dict(re.findall(r"^([\w-]+)[^;\n]*?>=([\d.]+)", needs, re.M))
    told = {"torch": "PyTorch", "peft": "PEFT", "sae-lens": "SAELens"}
    for name in (*told, "transformers"):
        assert f" {told.get(name, name)} {lowest[name]}," in limits
    urls = dict(url.split(", ") for url in about.get_all("Project-URL"))
    assert {"Documentation", "Source", "Changelog", "Issues"} <= set(urls)
    assert about["License"] == "Apache-2.0"
    assert set(about.get_all("Provides-Extra")) == {"tasks", "cluster", "dev"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_are_pinned_and_hold_no_secret(path):
    text = path.read_text()
    assert yaml.safe_load(text)["jobs"] and "secrets." not in text
    for action in re.findall(r"uses: (\S+)", text):
        assert re.search(r"@v\d", action), action
    assert "permissions:" in text
