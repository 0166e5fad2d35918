"""The licence of a model built on two backbones, and the files that their licences ask for."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, ModelCard

from backbones import HUB_ID, OFFLINE_LICENSE
from llm_cache import write_whole
from repository import LOCAL

ROOT = Path(__file__).resolve().parent
GEMMA_TERMS = ROOT / "data" / "gemma_terms_of_use.txt"
APACHE_LICENSE = ROOT / "LICENSE"
# The sentence is that of section 3.1 of the Gemma Terms of Use, to the letter.
GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
# And this one that of section 1.b of the Llama community licences.
LLAMA_NOTICE = (
    "Llama {version} is licensed under the Llama {version} Community License, Copyright © Meta Platforms, Inc. All Rights "
    "Reserved."
)
# Licences that let a work with them be passed on under another one.
PERMISSIVE = frozenset(
    {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "bsd", "isc", "cc0-1.0", "unlicense", "cc-by-4.0", "afl-3.0"}
)
LICENSE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class License:
    """The Hub's identifier of a licence; `other` comes with a name and a link of its own."""

    id: str
    name: str | None = None
    link: str | None = None

    def __str__(self):
        return self.name or self.id


class UnknownLicenseError(ValueError):
    """A backbone's licence is not to be found out, or those of two cannot both be kept."""


def backbone_license(name: str, api: HfApi) -> License:
    """The licence of a backbone, as its package, the model card in its directory, or its page on the Hub says.

    Raises:
        UnknownLicenseError: they name none.
        OSError: the Hub could not be asked.
    """
    if name in OFFLINE_LICENSE:
        return License(OFFLINE_LICENSE[name])
    if Path(name).is_dir():
        readme = Path(name) / "README.md"
        data = ModelCard.load(readme, ignore_metadata_errors=True).data if readme.is_file() else None
        where = "its directory has no README.md that names one"
    else:
        try:
            data, where = api.model_info(name).card_data, "its model card on the Hub names none"
        except (httpx2.HTTPError, OSError) as error:
            raise OSError(f"The licence of {name} could not be read from the Hub, try again: {error}") from error
    found = data and data.get("license")
    if isinstance(found, list):
        found = found[0] if len(found) == 1 else None
    if not found:
        raise UnknownLicenseError(f"The licence of {name} is unknown: {where}.")
    link = data.get("license_link")
    if link and "://" not in link:  # a file of the backbone's repository
        link = f"https://huggingface.co/{name}/blob/main/{link}"
    return License(found, data.get("license_name"), link)


def backbone_licenses(record: dict, api: HfApi, given: str | None = None) -> dict[str, License]:
    """The licences of the backbones of a training by role; `given` is that of the one that cannot be found out.

    Raises:
        UnknownLicenseError: one is unknown and none is given.
        ValueError: one is given and all are known.
        OSError: the Hub could not be asked.
    """
    licenses, used = {}, False
    for role, backbone in record["backbones"].items():
        try:
            if backbone.get("license"):
                licenses[role] = License(**backbone["license"])
            elif backbone["name"].startswith(LOCAL):
                raise UnknownLicenseError(f"The licence of the {role}, a local checkpoint, is unknown.")
            else:
                licenses[role] = backbone_license(backbone["name"], api)
        except UnknownLicenseError as error:
            if given is None:
                raise UnknownLicenseError(
                    f"{error} The model must keep it: find it out and give it (--license of push_to_hub.py, --hub_license "
                    "of train.py), as https://huggingface.co/docs/hub/repositories-licenses abbreviates it."
                ) from error
            licenses[role], used = License(given), True
    if given is not None and not used:
        names = ", ".join(f"{role}: {license}" for role, license in licenses.items())
        raise ValueError(f"A licence is given, but those of the backbones are known ({names}) and have to be kept.")
    return licenses


def joint_license(licenses: dict[str, License]) -> License:
    """The licence of a model built on backbones with `licenses`: of those the one that asks for something.

    Raises:
        UnknownLicenseError: two do.
    """
    demanding = {license for license in licenses.values() if license.id not in PERMISSIVE}
    if len(demanding) > 1:
        names = " and ".join(f"{license} ({role})" for role, license in licenses.items())
        raise UnknownLicenseError(f"The licences {names} cannot both be that of the model.")
    return demanding.pop() if demanding else next(iter(licenses.values()))


def write_license_files(
    directory: Path, licenses: dict[str, License], modifications: str, backbones: dict[str, str], api: HfApi
):
    """Writes what the licences ask for.

    For Gemma that is the notice, with `modifications` saying what was changed, and a copy of the terms; for Llama its
    notice. `licenses/` gets the Apache License, which the code is under, and by role the licence files that the
    `backbones` (names by role) have on the Hub.

    Raises:
        OSError: the Hub could not be asked for them.
    """
    notices = []
    if any(license.id == "gemma" for license in licenses.values()):
        notices.append(GEMMA_NOTICE)
        _copy(GEMMA_TERMS, directory / "GEMMA_TERMS_OF_USE.txt")
    for license in licenses.values():
        if license.id.startswith("llama"):
            notices.append(LLAMA_NOTICE.format(version=license.id.removeprefix("llama")))
    if notices:
        notice = "\n\n".join([*notices, modifications]) + "\n"
        write_whole(directory / "NOTICE", lambda path: path.write_text(notice))
    (directory / "licenses").mkdir(exist_ok=True)
    _copy(APACHE_LICENSE, directory / "licenses" / "Apache-2.0.txt")
    for role, name in backbones.items():
        if name in HUB_ID or name.startswith(LOCAL):
            continue
        try:
            source = Path(api.snapshot_download(name, allow_patterns=list(LICENSE_FILES)))
        except (httpx2.HTTPError, OSError) as error:
            raise OSError(f"The licence files of {name} could not be fetched, try again: {error}") from error
        for file in sorted({file for pattern in LICENSE_FILES for file in source.glob(pattern)}):
            (directory / "licenses" / role).mkdir(exist_ok=True)
            _copy(file, directory / "licenses" / role / file.name)


def _copy(source: Path, target: Path):
    write_whole(target, partial(shutil.copyfile, source))
