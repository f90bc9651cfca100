"""The page of the command says what the command says of itself."""

import typer

from sae_lora.cli import app
from sae_lora.reference import PAGE, reference_page


def test_the_page_is_that_of_the_command(root):
    told = f"{PAGE} is old; python -c 'from sae_lora.reference import *; write_reference()'"
    assert (root / PAGE).read_text() == reference_page(), told


def test_every_option_is_on_the_page(root):
    text = (root / PAGE).read_text()
    for name, command in typer.main.get_command(app).commands.items():
        part = text[text.index(f"### sae-lora {name}\n") :].split("\n#", 1)[0]
        for parameter in command.params:
            shown = [o if o[0] == "-" else o.upper() for o in parameter.opts]
            assert all(f"`{o}`" in part for o in shown), (name, parameter.name)
