"""The names that the package itself gives, each imported when it is first asked for."""

import importlib
import subprocess
import sys

import pytest

import sae_lora


def run(code: str) -> str:
    "What `code` prints in a process of its own, which has imported nothing yet."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_names_are_the_modules_own():
    from sae_lora import (
        add_lora,
        fidelity,
        fit_lora,
        load_adapter,
        load_lm,
        load_sae,
        save_adapter,
        splice,
        token_blocks,
    )

    found = [add_lora, fidelity, fit_lora, load_adapter, load_lm]
    found += [load_sae, save_adapter, splice, token_blocks]
    assert {f.__name__ for f in found} == set(sae_lora.__all__)
    for f in found:
        assert f is getattr(importlib.import_module(f.__module__), f.__name__)
        assert f is getattr(sae_lora, f.__name__)


def test_every_name_is_listed():
    assert set(sae_lora.__all__) <= set(dir(sae_lora))
    assert "__version__" in dir(sae_lora)


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'splyce'"):
        sae_lora.splyce
    with pytest.raises(ImportError, match="splyce"):
        exec("from sae_lora import splyce")


def test_importing_the_package_imports_no_torch():
    loaded = run("import sys, sae_lora; print(*sys.modules)").split()
    assert "sae_lora" in loaded
    assert not {"torch", "transformers", "peft", "sae_lens", "typer"} & set(loaded)
    assert [name for name in loaded if name.startswith("sae_lora.")] == []


@pytest.mark.parametrize(
    "first",
    [
        "",
        "import sae_lora.splice",
        "import sae_lora.metrics",
        "from sae_lora.splice import check_saes",
        "import importlib; importlib.import_module('sae_lora.splice')",
        "import sae_lora.splice, importlib; importlib.reload(sys.modules['sae_lora.splice'])",
    ],
)
def test_splice_is_the_function_whatever_was_imported_before(first):
    "`sae_lora.splice` is a module too, and Python sets modules as attributes of their package."
    code = f"import sys; {first}\nfrom sae_lora import splice\nprint(type(splice).__name__)\n"
    code += "import sae_lora\nassert splice is sae_lora.splice\n"
    code += "assert splice is sys.modules['sae_lora.splice'].splice\n"
    assert run(code) == "function"


def test_modules_are_found_as_ever():
    code = "from sae_lora import lm, metrics\nfrom sae_lora.splice import splice, check_saes\n"
    code += "import sae_lora.sae\nprint(lm.__name__, sae_lora.sae.__name__, sae_lora.lm is lm)"
    assert run(code) == "sae_lora.lm sae_lora.sae True"
