"""The licence of a model built on two backbones, and the files that the licences ask for."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from backbones import HUB_ID, OFFLINE_LICENSE
from repository import LOCAL

ROOT = Path(__file__).resolve().parent
GEMMA_TERMS = ROOT / "data" / "gemma_terms_of_use.txt"
APACHE_LICENSE = ROOT / "LICENSE"
# The sentence is that of section 3.1 of the Gemma Terms of Use, to the letter.
GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
# Licences that let a work with them be passed on under another one.
PERMISSIVE = frozenset(
    {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "bsd", "isc", "cc0-1.0", "unlicense", "cc-by-4.0", "afl-3.0"}
)
GIVE_LICENSE = (
    "A model built on it must keep it: find it out and give it with --license, as the Hub abbreviates licences "
    "(https://huggingface.co/docs/hub/repositories-licenses)."
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
    """A backbone's licence could not be found, or two cannot both be kept."""


def backbone_license(name: str, api: HfApi) -> License:
    """The licence of a backbone, as its package, the model card in its directory, or its page on the Hub says.

    Raises:
        UnknownLicenseError: they say nothing.
    """
    if name in OFFLINE_LICENSE:
        return License(OFFLINE_LICENSE[name])
    if Path(name).is_dir():
        readme = Path(name) / "README.md"
        data = ModelCard.load(readme, ignore_metadata_errors=True).data if readme.is_file() else None
        reason = "its directory has no README.md that names one"
    else:
        try:
            data, reason = api.model_info(name).card_data, f"its model card on {api.endpoint} names none"
        except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
            data, reason = None, f"its page on the Hub could not be read ({type(error).__name__})"
    found = data and data.get("license")
    if not found:
        raise UnknownLicenseError(f"The licence of {name} is unknown: {reason}. {GIVE_LICENSE}")
    return License(found, data.get("license_name"), data.get("license_link"))


def joint_license(licenses: dict[str, License]) -> License:
    """The licence of a model built on backbones with `licenses`, by backbone: the one that asks for something.

    Raises:
        UnknownLicenseError: two of them do.
    """
    demanding = {license for license in licenses.values() if license.id not in PERMISSIVE}
    if len(demanding) > 1:
        names = ", ".join(f"{name} ({license})" for name, license in licenses.items())
        raise UnknownLicenseError(
            f"The licences of {names} cannot both be that of the model: give one with --license."
        )
    return demanding.pop() if demanding else next(iter(licenses.values()))


def write_license_files(directory: Path, license: License, modifications: str, backbones: dict[str, str], api: HfApi):
    """Writes what the licences ask for.

    For Gemma that is the notice, with `modifications` saying what was changed, and a copy of the terms. `licenses/` gets
    the Apache License, which the code is under (and the offline encoder), and by role the licence files that the
    `backbones` (names by role) have on the Hub.

    Raises:
        OSError: the Hub could not be asked for them.
    """
    if license.id == "gemma":
        (directory / "NOTICE").write_text(f"{GEMMA_NOTICE}\n\n{modifications}\n")
        shutil.copyfile(GEMMA_TERMS, directory / "GEMMA_TERMS_OF_USE.txt")
    (directory / "licenses").mkdir(exist_ok=True)
    shutil.copyfile(APACHE_LICENSE, directory / "licenses" / "Apache-2.0.txt")
    for role, name in backbones.items():
        if name in HUB_ID or name.startswith(LOCAL):
            continue
        try:
            source = Path(api.snapshot_download(name, allow_patterns=list(LICENSE_FILES)))
        except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
            raise OSError(f"The licence files of {name} could not be fetched from the Hub: {error}") from error
        for file in sorted({file for pattern in LICENSE_FILES for file in source.glob(pattern)}):
            (directory / "licenses" / role).mkdir(exist_ok=True)
            shutil.copyfile(file, directory / "licenses" / role / file.name)
