// Load an artifact: edgehp/artifact/check.py in C++, in the same order and with the same words.
//
// An engine file is executable code, so manifest, state, device and every byte are checked before
// any engine opens.
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <regex>
#include <set>
#include <system_error>

#include <nlohmann/json.hpp>
#include <openssl/sha.h>

#include "edgehp.hpp"

namespace edgehp {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int schema_version = 3;
constexpr std::size_t largest_manifest = 4 << 20;
const std::string manifest_name = "manifest.json";
const std::string copy_again = "\nhint: copy the artifact again or build it again";
// Modules of one target that differ in nothing an engine sees, as targets/*.toml lists them.
const std::map<std::string, std::set<std::string>> same_modules = {
    {"orin-agx-64gb", {"p3701-0005", "p3701-0000"}},
    {"orin-nano-8gb", {"p3767-0003", "p3767-0005"}},
};

template <typename... Parts>
void compatible(bool right, const Parts&... otherwise) {
    require(right, EDGEHP_INCOMPATIBLE, otherwise...);
}

std::string sha256(const std::string& bytes) {
    unsigned char digest[SHA256_DIGEST_LENGTH];
    SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), digest);
    std::string text;
    for (const unsigned char byte : digest) text += cv::format("%02x", byte);
    return text;
}

// At most `limit` bytes of a file; none where it cannot be read.
std::string read_file(const std::string& path, std::size_t limit) {
    std::ifstream file(path, std::ios::binary);
    std::string bytes(limit, '\0');
    file.read(bytes.data(), static_cast<std::streamsize>(limit));
    bytes.resize(static_cast<std::size_t>(file.gcount()));
    return bytes;
}

// The size of a regular file that is reached over no symbolic link inside the artifact.
std::int64_t require_plain(const std::string& root, const std::string& name) {
    struct stat status {};
    std::string step = root;
    for (const fs::path& part : fs::path(name)) {
        step += "/" + part.string();
        compatible(lstat(step.c_str(), &status) == 0, step, ": missing (",
                   std::generic_category().message(errno), "), expected the artifact's file",
                   copy_again);
        compatible(!S_ISLNK(status.st_mode), step, ": found a symbolic link, expected a file "
                   "inside the artifact\nhint: copy the artifact again, following links");
    }
    compatible(S_ISREG(status.st_mode), step,
               ": expected a regular file; build the artifact again");
    return status.st_size;
}

// What is read of a manifest whose digest fits: only its maker can have got it wrong. Throws what
// is wrong with the values, edgehp/artifact/manifest.py checks the others too.
void read_values(const json& m, Artifact& a) {
    const auto one_of = [](const json& found, const std::set<std::string>& expected) {
        compatible(expected.count(found.get<std::string>()), found, " is not expected");
        return found.get<std::string>();
    };
    const auto whole = [](const json& found, std::int64_t least, std::int64_t most) {
        compatible(found.is_number_integer() && found >= least && found <= most, found,
                   " is not within ", least, "..", most);
        return found.get<std::int64_t>();
    };
    const auto listed = [&](const std::string& name) {
        compatible(a.files.count(name), name, " is not listed under files");
        return a.path + "/" + name;
    };
    static const std::regex plain("[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)?");
    for (const json& file : m.at("files")) {
        const std::string name = file.at("path");
        compatible(name.size() <= 200 && std::regex_match(name, plain), "a file is called ", name);
        a.files[name] = {file.at("sha256"), whole(file.at("size"), 0, 1ll << 32)};
    }
    const json &spec = m.at("preprocessing").at("spec"), &target = m.at("target");
    a.size = static_cast<int>(whole(spec.at("size"), 16, 1024));
    a.area = one_of(spec.value("resize", json("area")), {"area", "linear"}) == "area";
    a.square = one_of(spec.value("box_rule", json("square")), {"square", "stretch"}) == "square";
    a.box_scale = spec.value("box_scale", 1.0);
    compatible(a.box_scale >= 0.1 && a.box_scale <= 10, "box_scale is not within 0.1..10");
    a.target = target.at("name");
    if (const json module = target.value("module", json()); !module.is_null())
        a.module = module.get<std::string>();
    target.value("compute_capabilities", json::array()).get_to(a.compute_capabilities);
    for (const std::string& found : a.compute_capabilities)
        compatible(found.size() <= 4 && std::regex_match(found, std::regex("[0-9]{1,2}\\.[0-9]")),
                   "compute_capabilities has ", found);
    a.precision = m.at("precision").at("asked");
    const json &golden = m.at("golden"), &network = m.at("network").at("spec");
    a.golden_path = listed(golden.at("file"));
    golden.at("angles").get_to(a.golden_angles);
    compatible(!a.golden_angles.empty(), "golden.angles is empty");
    a.tolerance = golden.at("tolerance_degrees");
    const json &recipe = m.at("build").at("recipe"), core = recipe.value("dla", json());
    if (!core.is_null()) a.dla_core = static_cast<int>(whole(core, 0, 64));
    // A network of someone else may have no bins.
    if (const json bins = network.is_null() ? json() : network.value("bins", json());
        !bins.is_null()) {
        a.first_bin = bins.at("first");
        a.last_bin = bins.at("last");
    }
    if (one_of(m.at("state"), {"complete", "deferred"}) == "deferred") return;
    const json& engine = m.at("engine");
    a.engine_kind =
        one_of(engine.at("kind"), {"openvino", "onnxruntime", "tensorrt", "tensorrt-rtx"});
    a.engine_path = listed(engine.at("files").at(0));
    engine.at("versions").get_to(a.versions);
}

// Version and digest, which every manifest begins with, are checked before anything is parsed.
Artifact read_manifest(const std::string& root) {
    std::error_code ignored;
    require(fs::is_directory(root, ignored), EDGEHP_DATA, root, ": no such artifact directory\n"
            "hint: make one with 'edgehp build', or name one that holds a ", manifest_name);
    require_plain(root, manifest_name);
    const std::string where = root + "/" + manifest_name;
    std::string bytes = read_file(where, largest_manifest + 1);
    compatible(bytes.size() <= largest_manifest, where, ": ", bytes.size(), " bytes, expected at "
               "most ", largest_manifest, "; build the artifact again");
    static const std::regex head_form(
        "\\{\n \"schema_version\": ([0-9]{1,9}),\n \"digest\": \"([0-9a-f]{64})\",\n");
    static const std::regex by_form("\n \"edgehp_version\": \"([!-~]{1,40})\",\n");
    std::smatch head, by;
    compatible(std::regex_search(bytes, head, head_form, std::regex_constants::match_continuous),
               where, " is not a manifest of edgehp: it does not begin with a schema version and a "
               "digest\nhint: build or copy the artifact again");
    const int version = std::stoi(head[1]);
    compatible(version >= schema_version, where, ": found manifest schema ", version, ", expected ",
               schema_version, ": made by an older edgehp: build it again");
    if (version > schema_version) {
        std::regex_search(bytes, by, by_form);
        compatible(false, where, ": found manifest schema ", version, ", this edgehp reads up to ",
                   schema_version, "; it was written by edgehp ",
                   by.empty() ? "of an unknown version" : by.str(1),
                   ": install that version or build the artifact again");
    }
    const std::string said = head[2];
    bytes.replace(static_cast<std::size_t>(head.position(2)), said.size(), said.size(), '0');
    const std::string found = sha256(bytes);
    compatible(found == said, where, ": the manifest was altered: its digest is ",
               found.substr(0, 16), "..., it says ", said.substr(0, 16),
               "...\nhint: build the artifact again or copy it again");
    Artifact artifact;
    artifact.path = root;
    try {
        const json values = json::parse(bytes, nullptr, false);
        compatible(!values.is_discarded(), "it is not JSON in UTF-8");
        read_values(values, artifact);
    } catch (const std::exception& fault) {
        compatible(false, where, " is not a manifest of this version of edgehp: ",
                   std::string(fault.what()).substr(0, 200), "; build or copy the artifact again");
    }
    return artifact;
}

// The release in a version: 10.14.1.48.post1 gives 10, 14, 1, 48. Trailing zeros do not count, nor
// what follows a hyphen, as in OpenVINO's 2026.4.0-21-abc.
std::vector<unsigned long> parse_version(const std::string& text) {
    static const std::regex form("v?([0-9]+(\\.[0-9]+)*)([^0-9].*)?");
    std::smatch found;
    require(std::regex_match(text, found, form), EDGEHP_DATA, "version '", text,
            "' is not numbers joined by dots, such as '10.3.0'");
    std::vector<unsigned long> release;
    std::istringstream parts(found[1]);
    for (std::string part; std::getline(parts, part, '.');)
        release.push_back(std::strtoul(part.c_str(), nullptr, 10));
    while (!release.empty() && release.back() == 0) release.pop_back();
    return release;
}

// The part number of a Jetson's module; every other number in a device tree is a carrier's.
std::string module_part(const std::string& text) {
    static const std::regex form("\\bp(3701|3767|3834)-[0-9]{4}(?![0-9])");
    std::smatch found;
    return std::regex_search(text, found, form) ? found.str() : "";
}

std::optional<std::string> module_here() {
    const auto text = [](const char* path) {
        std::string found = read_file(path, 1 << 16);
        found.erase(found.find_last_not_of(std::string("\0\n", 2)) + 1);
        std::replace(found.begin(), found.end(), '\0', ' ');
        return found;
    };
    const std::string compatible = text("/proc/device-tree/compatible");
    if ((" " + compatible).find(" nvidia,tegra") == std::string::npos) return std::nullopt;
    const std::string model = text("/proc/device-tree/model"), part = module_part(compatible);
    return (model.empty() ? "unnamed Jetson" : model) + (part.empty() ? "" : " (" + part + ")");
}

bool same_module(const Artifact& artifact, const std::optional<std::string>& here) {
    const std::string a = module_part(*artifact.module), b = module_part(here.value_or(""));
    if (a.empty() || b.empty()) return here == artifact.module;
    const auto parts = same_modules.find(artifact.target);
    return a == b || (parts != same_modules.end() && parts->second.count(a) &&
                      parts->second.count(b));
}

void check_version(const Artifact& artifact, const Device& device, const std::string& rebuild) {
    const std::string &kind = artifact.engine_kind, &where = artifact.path;
    const auto &versions = artifact.versions;
    compatible(versions.count(kind), where, ": the manifest does not say which ", kind,
               " built the engine; ", rebuild);
    const std::string& built = versions.at(kind);
    require(device.versions.count(kind), EDGEHP_ENVIRONMENT, where, " needs ", kind, " ", built,
            ", which is not installed; run 'edgehp doctor'");
    const std::string made = where + " was built with " + kind + " " + built + "; found ";
    std::string here = device.versions.at(kind);
    // These read what an older release wrote.
    if (kind == "openvino") {
        compatible(parse_version(here) >= parse_version(built), made, "the older ", here,
                   ": install ", built, " or newer, or ", rebuild);
        return;
    }
    // Of TensorRT's version-compatible engines: read by later releases of this major version.
    if (const auto major = versions.find("tensorrt_major"); major != versions.end()) {
        const auto release = parse_version(here);
        compatible(!release.empty() && std::to_string(release[0]) == major->second &&
                       release >= parse_version(built),
                   made, here, ": install ", built, " or a later ", major->second, ".x, or ",
                   rebuild);
        return;
    }
    // On a Jetson, TensorRT's Python package leaves out the number of the build: 10.3.0.
    if (std::count(built.begin(), built.end(), '.') == 2 &&
        std::count(here.begin(), here.end(), '.') == 3)
        here.resize(here.rfind('.'));
    compatible(parse_version(here) == parse_version(built), made, here,
               ", and its engines need exactly the same version: install it, or ", rebuild);
}

void check_gpu(const Artifact& artifact, const Device* told) {
    const auto& right = artifact.compute_capabilities;
    std::string wanted = "a GPU of compute capability " + right[0];
    for (std::size_t i = 1; i < right.size(); ++i) wanted += " or " + right[i];
    wanted += " (target " + artifact.target + ")";
    std::vector<std::pair<std::string, std::string>> gpus;
    try {
        gpus = told ? told->gpus : cuda_gpus();
    } catch (const Error& error) {
        require(false, error.status, artifact.path, " needs ", wanted, ": ", error.what());
    }
    // The first GPU is the one a runtime takes unless told otherwise.
    const auto [name, capability] = gpus.empty() ? decltype(gpus)::value_type() : gpus[0];
    compatible(std::find(right.begin(), right.end(), capability) != right.end(), artifact.path,
               " was built for ", wanted, "; this machine has ",
               gpus.empty() ? "no NVIDIA GPU"
                            : name + " (compute capability " + capability + ")",
               ": use it on the right device, or build one for this one with 'edgehp build "
               "--target ...' (see 'edgehp targets')");
}

void check_device(const Artifact& artifact, const Device* told) {
    const std::string rebuild = "build it here: edgehp build --target " + artifact.target +
                                " --precision " + artifact.precision;
    if (!artifact.compute_capabilities.empty()) check_gpu(artifact, told);
    Device device = told ? *told : Device{{}, module_here(), {}};
    if (!told)
        for (const auto& [kind, runtime] : runtimes()) device.versions[kind] = runtime.version();
    compatible(!artifact.module || same_module(artifact, device.module), artifact.path,
               " was built on '", artifact.module.value_or(""), "'; this is '",
               device.module.value_or("no Jetson"),
               "', whose clocks, memory and number of SMs differ; ", rebuild);
    check_version(artifact, device, rebuild);
}

void check_files(const Artifact& artifact) {
    for (const auto& [name, record] : artifact.files) {
        const std::int64_t size = require_plain(artifact.path, name);
        compatible(size == record.second, artifact.path, "/", name, ": found ", size,
                   " bytes, the manifest says ", record.second, copy_again);
    }
    for (const auto& [name, record] : artifact.files) {
        const std::string path = artifact.path + "/" + name;
        // One more byte than there should be, in case the file grows.
        const auto found = sha256(read_file(path, static_cast<std::size_t>(record.second) + 1));
        compatible(found == record.first, path, " was changed: found SHA-256 ",
                   found.substr(0, 16), "..., the manifest says ", record.first.substr(0, 16),
                   "...", copy_again);
    }
    std::set<fs::path> unlisted;
    const auto options = fs::directory_options::skip_permission_denied;
    for (const auto& entry : fs::recursive_directory_iterator(artifact.path, options)) {
        const fs::path name = entry.path().lexically_relative(artifact.path);
        // Reports are written beside the listed files later, and never opened.
        if (!fs::is_directory(entry.symlink_status()) && *name.begin() != "reports" &&
            name != manifest_name && !artifact.files.count(name.string()))
            unlisted.insert(name);
    }
    for (const fs::path& name : unlisted)
        compatible(false, artifact.path, "/", name.string(), ": a file that the manifest does not "
                   "list; remove it, or build the artifact again");
}

}  // namespace

Artifact load_artifact(const std::string& path, const Device* told) {
    const Artifact artifact = read_manifest(path.substr(0, path.find_last_not_of('/') + 1));
    const std::string& kind = artifact.engine_kind;
    compatible(!kind.empty(), artifact.path, " is deferred: its engine is not built yet\nhint: "
               "finish it on the device (", artifact.target, ") with: edgehp build --finish ",
               artifact.path);
    require(runtimes().count(kind), EDGEHP_ENVIRONMENT, artifact.path, " is for ", kind,
            ", which is not built into this program\nhint: build ",
            kind == "openvino" || kind == "tensorrt" ? "it with " + kind + ", see docs/cpp.md"
                                                     : "the artifact for OpenVINO or TensorRT");
    check_device(artifact, told);
    check_files(artifact);
    return artifact;
}

}  // namespace edgehp
