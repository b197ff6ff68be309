"""What a bundle is made of, as SPDX 3.0.1 with its AI profile.

One JSON-LD document in every bundle, ``sbom.spdx.json``: the network with its metrics and gate, the
data it was trained, calibrated and tested on, the files, and what they need at run time with
versions and licences. It says what the manifest says and nothing that nobody measured.

Format: https://spdx.github.io/spdx-spec/v3.0.1/
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from edgehp.artifact.manifest import Accuracy, Manifest
from edgehp.device import DISTRIBUTIONS
from edgehp.errors import EdgehpError
from edgehp.files import read_json
from edgehp.shipping.signature import require

logger = logging.getLogger(__name__)

SBOM_NAME = "sbom.spdx.json"
_NO_ASSERTION = "https://spdx.org/rdf/3.0.1/terms/Core/NoAssertionElement"
# What a licence says before the names of the data, as in "non-commercial only: trained on AFLW".
_TRAINED_ON = re.compile(r"trained on (.+)", re.IGNORECASE | re.DOTALL)
# A licence in a package's metadata that is an expression, and not a text or a name of its own.
_EXPRESSION = re.compile(r"[A-Za-z0-9.+-]+( (AND|OR|WITH) [A-Za-z0-9.+-]+)*")
_NAMES = {
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
# As packages write it -> as SPDX does.
_SPELLINGS = {"Apache 2.0": "Apache-2.0", "BSD": "BSD-3-Clause", "MIT License": "MIT"}


def spdx_document(manifest: Manifest, energy: dict[str, float] | None = None) -> bytes:
    """The SPDX document of an artifact.

    The same manifest, and the same packages installed here, give the same bytes.

    Args:
        manifest: of the artifact.
        energy: measured joules of one inference by power rail.

    Raises:
        EnvironmentalError: the package ``spdx-python-model`` is missing.
    """
    model = require("spdx_python_model", "sign").v3_0_1
    document = _Document(model, manifest)
    document.add_network(energy or {})
    document.add_data()
    document.add_files()
    document.add_dependencies()
    return document.text()


def measured_energy(artifact: Path, digest: str) -> dict[str, float]:
    """Joules of one inference by power rail, from the benchmark reports in ``reports/``.

    Empty where none was measured for the artifact whose manifest has this digest.
    """
    # Imported here: it brings numpy and OpenCV.
    from edgehp.benchmark.report import BenchmarkReport

    found: dict[str, float] = {}
    for path in sorted(artifact.glob("reports/*.json")):
        try:
            report = read_json(path, BenchmarkReport)
        except EdgehpError as e:
            if path.name.startswith("bench-"):
                logger.warning("no energy is taken from %s", e)
            continue
        energy = report.results["artifact"].energy
        if energy is not None and report.subjects["artifact"].manifest_digest == digest:
            found |= {k: v for k, v in energy.joules_per_image.items() if v is not None}
    return found


class _Document:
    """Collects the elements of one document."""

    def __init__(self, model: Any, manifest: Manifest) -> None:
        self._model, self._manifest = model, manifest
        self._namespace = f"urn:spdx:edgehp:{manifest.digest}"
        self._objects = model.SHACLObjectSet()
        self._count = 0
        self._created = datetime.strptime(manifest.created + "+0000", "%Y-%m-%dT%H:%M:%SZ%z")
        self._info = model.CreationInfo(created=self._created, specVersion="3.0.1")
        agent = self._element("SoftwareAgent", "agent", name="edgehp bundle")
        self._info.createdBy = [agent.spdxId]
        # The AI profile asks who supplies a network. Nobody here knows the company.
        self._supplier = agent.spdxId
        self._network: Any = None

    def add_network(self, energy: dict[str, float]) -> None:
        """The AI package: what it is, how it was made, and how good and how hungry it is."""
        m, network = self._manifest, self._manifest.network
        spec = network.spec or {}
        parameters = {
            "precision": m.precision.asked,
            "target": m.target.name,
            "input size": f"{m.preprocessing.size} x {m.preprocessing.size} pixels, RGB",
        }
        if m.calibration is not None:
            parameters["calibration method"] = m.calibration.method
        self._network = self._element(
            "ai_AIPackage",
            "network",
            name=m.name,
            software_packageVersion=network.digest or network.weights_sha256,
            software_primaryPurpose=self._model.software_SoftwarePurpose.model,
            software_downloadLocation=_NO_ASSERTION,
            suppliedBy=self._supplier,
            releaseTime=self._created,
            verifiedUsing=[self._hash(network.weights_sha256)],
            ai_domain=["driver monitoring", "head pose estimation"],
            ai_typeOfModel=[f"{spec.get('architecture', 'ONNX graph')} ({network.source})"],
            ai_informationAboutTraining=network.licence or "not known",
            ai_hyperparameter=self._entries(parameters),
            ai_modelDataPreprocessing=[
                f"edgehp preprocessing, sha256:{m.preprocessing.digest}",
                json.dumps(m.preprocessing.to_dict(), sort_keys=True),
            ],
            ai_metric=self._entries(_metrics(m.accuracy)),
            ai_metricDecisionThreshold=self._entries(
                {} if m.accuracy is None else {"drop, degrees, at most": f"{m.accuracy.max_drop:g}"}
            ),
            ai_limitation="Angles of one face at a time; not a safety function by itself.",
        )
        if m.rxswin is not None:
            self._network.externalIdentifier = [
                self._model.ExternalIdentifier(
                    externalIdentifierType=self._model.ExternalIdentifierType.other,
                    identifier=m.rxswin,
                    comment="RXSWIN (UNECE R156)",
                )
            ]
        if energy:
            description = self._model.ai_EnergyConsumptionDescription
            megajoule = self._model.ai_EnergyUnitType.megajoule
            self._network.ai_energyConsumption = self._model.ai_EnergyConsumption(
                ai_inferenceEnergyConsumption=[
                    description(ai_energyQuantity=joules * 1e-6, ai_energyUnit=megajoule)
                    for joules in energy.values()
                ]
            )
        self._license(self._network, network.licence)

    def add_data(self) -> None:
        """What the network was trained, calibrated and tested on."""
        m = self._manifest
        named = _TRAINED_ON.search(m.network.licence)
        self._relate("trainedOn", self._data("training", named[1] if named else "not named"))
        if (calibration := m.calibration) is not None:
            data = self._data("calibration", calibration.source, calibration.list_sha256)
            data.dataset_datasetSize = calibration.count
            self._relate("hasInput", data, comment="calibrated with these crops")
        if (accuracy := m.accuracy) is not None:
            found = accuracy.protocol.get("sha256")
            data = self._data("test", accuracy.dataset, found if isinstance(found, str) else None)
            data.dataset_datasetSize = accuracy.count
            self._relate("testedOn", data)

    def add_files(self) -> None:
        """The files that travel, with their hashes."""
        purposes = self._model.software_SoftwarePurpose
        kinds = {"engine": purposes.model, "graph": purposes.model, "golden": purposes.test}
        files = [
            self._element(
                "software_File",
                f"file-{index}",
                name=file.path,
                verifiedUsing=[self._hash(file.sha256)],
                software_primaryPurpose=kinds.get(file.role, purposes.data),
            )
            for index, file in enumerate(self._manifest.files)
        ]
        self._relate("contains", *files)

    def add_dependencies(self) -> None:
        """What the device needs: edgehp, what it requires, and the engine's runtime."""
        engine = self._manifest.engine
        needed = {"edgehp": self._manifest.edgehp_version}
        for name in _requirements("edgehp"):
            needed[name] = ""
        if engine is not None:
            needed[_distribution(engine.kind)] = engine.versions.get(engine.kind, "")
        packages = []
        for name, version in sorted(needed.items()):
            installed, license_text = _installed(name)
            package = self._element(
                "software_Package",
                f"package-{name}",
                name=name,
                software_packageVersion=version or installed or "not known",
                software_primaryPurpose=self._model.software_SoftwarePurpose.library,
            )
            if name != "edgehp":
                package.software_packageUrl = f"pkg:pypi/{name.lower()}"
            self._license(package, license_text)
            packages.append(package)
        self._relate("dependsOn", *packages)

    def text(self) -> bytes:
        """The document, checked by the model against the specification's constraints."""
        profile = self._model.ProfileIdentifierType
        self._element(
            "SpdxDocument",
            "document",
            name=f"{self._manifest.name} (edgehp)",
            rootElement=[self._network.spdxId],
            profileConformance=[
                profile.core,
                profile.software,
                profile.simpleLicensing,
                profile.ai,
            ],
        )
        self._objects.add(self._info)
        buffer = io.BytesIO()
        self._model.JSONLDSerializer().write(self._objects, buffer)
        values = json.loads(buffer.getvalue())
        # The serializer's order follows object identities: sort it, so that equal input gives
        # equal bytes.
        values["@graph"].sort(key=lambda item: item.get("spdxId") or item.get("@id") or "")
        return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()

    def _element(self, kind: str, identity: str, **values: Any) -> Any:
        element = getattr(self._model, kind)(
            spdxId=f"{self._namespace}:{identity}", creationInfo=self._info, **values
        )
        self._objects.add(element)
        return element

    def _relate(self, kind: str, *to: Any, source: Any = None, comment: str | None = None) -> None:
        """Relate `source`, the network by default, to what is given."""
        self._count += 1
        relation = self._element(
            "Relationship",
            f"relation-{self._count}",
            from_=(source or self._network).spdxId,
            to=[element.spdxId for element in to],
            relationshipType=getattr(self._model.RelationshipType, kind),
        )
        if comment is not None:
            relation.comment = comment

    def _data(self, role: str, name: str, sha256: str | None = None) -> Any:
        return self._element(
            "dataset_DatasetPackage",
            f"data-{role}",
            name=name,
            dataset_datasetType=[self._model.dataset_DatasetType.image],
            software_primaryPurpose=self._model.software_SoftwarePurpose.data,
            verifiedUsing=[] if sha256 is None else [self._hash(sha256)],
        )

    def _license(self, element: Any, text: str) -> None:
        if not text:
            return
        self._count += 1
        if element is not self._network and _EXPRESSION.fullmatch(text):
            kind, value = "simplelicensing_LicenseExpression", "simplelicensing_licenseExpression"
        else:
            kind, value = "simplelicensing_SimpleLicensingText", "simplelicensing_licenseText"
        declared = self._element(kind, f"license-{self._count}", **{value: text})
        self._relate("hasDeclaredLicense", declared, source=element)

    def _hash(self, sha256: str) -> Any:
        return self._model.Hash(algorithm=self._model.HashAlgorithm.sha256, hashValue=sha256)

    def _entries(self, values: dict[str, str]) -> list[Any]:
        return [self._model.DictionaryEntry(key=k, value=v) for k, v in values.items()]


def _metrics(accuracy: Accuracy | None) -> dict[str, str]:
    """The gate's figures, by a name that says what they are."""
    if accuracy is None:
        return {}
    low, high = accuracy.interval
    found = {
        f"{accuracy.metric}, degrees": f"{accuracy.drop:.6f}",
        f"{accuracy.metric}, 95 % interval, degrees": f"{low:.6f} to {high:.6f}",
        "crops": str(accuracy.count),
    }
    if accuracy.reference is not None and accuracy.artifact is not None:
        found["mean absolute error of FP32, degrees"] = f"{accuracy.reference:.6f}"
        found["mean absolute error of the artifact, degrees"] = f"{accuracy.artifact:.6f}"
    return found


def _requirements(name: str) -> Iterator[str]:
    """The distributions that `name` requires without extras, as far as they are installed."""
    try:
        required = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for text in required:
        if "extra ==" not in text:
            found = re.match(r"[A-Za-z0-9._-]+", text)
            if found is not None and _installed(found[0])[0] is not None:
                yield found[0]


def _distribution(kind: str) -> str:
    """The distribution that brings an engine's runtime: the one that is installed, or the usual."""
    names = DISTRIBUTIONS[kind]
    return next((name for name in names if _installed(name)[0] is not None), names[0])


def _installed(name: str) -> tuple[str | None, str]:
    """Version and licence of an installed distribution; None and nothing where it is not."""
    try:
        found = importlib.metadata.distribution(name).metadata
    except importlib.metadata.PackageNotFoundError:
        return None, ""
    text = _first(found.get_all("License-Expression"))
    if not text:
        classifiers = found.get_all("Classifier") or []
        text = next((_NAMES[c] for c in classifiers if c in _NAMES), "")
    if not text:
        lines = _first(found.get_all("License")).strip().splitlines()
        text = lines[0][:200] if lines else ""
    return found["Version"], _SPELLINGS.get(text, text)


def _first(values: list[str] | None) -> str:
    return values[0] if values else ""
