"""The one reader of version numbers: of packages, runtimes, JetPack and L4T."""

from __future__ import annotations

from edgehp.errors import DataError


def parse_version(text: str) -> tuple[int, ...]:
    """The release of a version: ``"10.14.1.48.post1"`` gives (10, 14, 1, 48).

    Suffixes do not count, nor do trailing zeros: package metadata and libraries do not agree on
    them. OpenVINO's own ``"2026.4.0-21-abc"`` is read up to the first hyphen.

    Raises:
        DataError: it is no version.
    """
    # Not above: `edgehp doctor` says what is missing, this package included.
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(text.partition("-")[0].strip()).release
    except InvalidVersion as e:
        raise DataError(f"version {text!r} is not numbers joined by dots, such as '10.3.0'") from e
    while release and release[-1] == 0:
        release = release[:-1]
    return release
