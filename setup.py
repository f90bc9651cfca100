"""The package as settings.ini describes it, with `data/` inside the wheel as `sae_lora/data`."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
s = config["DEFAULT"]
data = [
    str(p.relative_to("data"))
    for p in Path("data").rglob("*")
    if p.is_file() and not p.name.endswith(".part.jsonl")
]

PYTHONS = s["pythons"].split()  # those that the workflow tests
site, code = s["doc_host"], s["git_url"]


def anywhere(text: str) -> str:
    "Markdown whose pictures and links into this repository work wherever it is shown."
    text = re.sub(r"(!\[[^\]]*\])\((?!https?:)", rf"\1({code}/raw/{s['branch']}/", text)
    return re.sub(r"\]\((?!https?:|#)", f"]({code}/blob/{s['branch']}/", text)


setup(
    name=s["lib_name"],
    version=s["version"],
    description=s["description"],
    author=s["author"],
    author_email=s["author_email"],
    url=code,
    project_urls={
        "Documentation": site,
        "Source": code,
        "Changelog": f"{code}/blob/{s['branch']}/CHANGELOG.md",
        "Issues": f"{code}/issues",
        "Paper": "https://arxiv.org/abs/2501.19406",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: {version}" for version in PYTHONS),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    license="Apache-2.0",
    keywords=s["keywords"].split(),
    python_requires=f">={s['min_python']}",
    long_description=anywhere(Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    packages=["sae_lora", "sae_lora.data"],
    package_dir={"sae_lora.data": "data"},
    package_data={"sae_lora.data": data},
    install_requires=s["requirements"].split(),
    extras_require={
        "tasks": s["tasks_requirements"].split(),
        "cluster": s["cluster_requirements"].split(),
        "dev": " ".join(s[f"{k}_requirements"] for k in ("dev", "tasks", "cluster")).split(),
    },
    entry_points={"console_scripts": s["console_scripts"].split()},
    zip_safe=False,
)
