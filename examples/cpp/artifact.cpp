// Load an artifact: edgehp/artifact/check.py in C++, in the same order and with the same words.
//
// An engine file is executable code, so everything is checked against the device and the bytes
// before any engine opens: manifest, state, device, files.
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <system_error>

#include <nlohmann/json.hpp>
#include <openssl/evp.h>

#include "edgehp.hpp"

namespace edgehp {
namespace {

namespace fs = std::filesystem;
using json = nlohmann::ordered_json;
constexpr auto replace = json::error_handler_t::replace;

constexpr int schema_version = 3;
constexpr std::size_t largest_manifest = 4 << 20;
const std::string manifest_name = "manifest.json";
// Modules of one target that differ in nothing an engine sees, as targets/*.toml lists them.
const std::map<std::string, std::set<std::string>> same_modules = {
    {"orin-agx-64gb", {"p3701-0005", "p3701-0000"}},
    {"orin-nano-8gb", {"p3767-0003", "p3767-0005"}},
};

[[noreturn]] void incompatible(const std::string& what) { throw Error(EDGEHP_INCOMPATIBLE, what); }

// What is wrong inside a manifest, without the file's name.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// SHA-256 in hex.
std::string sha256(std::istream& bytes) {
    const std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)> context(EVP_MD_CTX_new(),
                                                                    EVP_MD_CTX_free);
    std::array<unsigned char, 32> digest{};
    std::vector<char> piece(1 << 20);
    bool fine = context && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr);
    while (fine && (bytes.read(piece.data(), 1 << 20), bytes.gcount() > 0))
        fine = EVP_DigestUpdate(context.get(), piece.data(), static_cast<size_t>(bytes.gcount()));
    if (!fine || !bytes.eof() || !EVP_DigestFinal_ex(context.get(), digest.data(), nullptr))
        throw Error(EDGEHP_ENVIRONMENT, "a file cannot be read, or OpenSSL computes no SHA-256");
    std::string text;
    for (const unsigned char byte : digest)
        for (const int nibble : {byte >> 4, byte & 15}) text += "0123456789abcdef"[nibble];
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

// A regular file that is reached over no symbolic link inside the artifact.
struct stat require_plain(const std::string& root, const std::string& name) {
    struct stat status {};
    std::string step = root;
    for (const fs::path& part : fs::path(name)) {
        step += "/" + part.string();
        if (lstat(step.c_str(), &status) != 0)
            incompatible(step + ": missing (" + std::generic_category().message(errno) +
                         "), expected the artifact's file\n"
                         "hint: copy the artifact again or build it again");
        if (S_ISLNK(status.st_mode))
            incompatible(step + ": found a symbolic link, expected a file inside the artifact\n"
                                "hint: copy the artifact again, following links");
    }
    if (!S_ISREG(status.st_mode))
        incompatible(step + ": expected a regular file; build the artifact again");
    return status;
}

// A text in quotes, without control characters.
std::string repr(const std::string& text) {
    const char quote = text.find('\'') != text.npos && text.find('"') == text.npos ? '"' : '\'';
    std::string out(1, quote);
    for (const char c : text) {
        const bool plain = c < 0 || (c >= ' ' && c != '\\');
        const std::string escaped = plain ? "" : json(std::string(1, c)).dump();
        out += plain ? std::string(1, c) : escaped.substr(1, escaped.size() - 2);
    }
    return out + quote;
}

// A value of the manifest and where it stands. What is read is checked as
// edgehp/artifact/manifest.py does; for what is not read the digest answers alone.
class Node {
public:
    // `or_null`: null would be as good.
    explicit Node(const json& value, std::string path = "", bool or_null = false)
        : value_(value), path_(std::move(path)), or_null_(or_null) {}

    Node at(const char* name, bool or_null = false) const {
        require_type(value_.is_object(), "object");
        const std::string path = path_ + (path_.empty() ? "" : ".") + name;
        if (!value_.contains(name)) throw Fault("key '" + path + "' is missing");
        return Node(value_[name], path, or_null);
    }
    Node operator[](const char* name) const { return at(name); }
    bool is_null() const { return value_.is_null(); }
    // Whether it has a member called `name` that is not null.
    bool has(const char* name) const {
        require_type(value_.is_object(), "object");
        return value_.contains(name) && !value_[name].is_null();
    }
    std::string text(const char* form = nullptr, std::size_t longest = 0) const {
        require_type(value_.is_string(), "str");
        const std::string found = value_;
        // Before the expression, which must not be held against megabytes.
        longest = longest ? longest : form ? found.size() : 500;
        require(found.size() <= longest, "str of length <= " + std::to_string(longest));
        require(!form || std::regex_match(found, std::regex(form)),
                "the form " + repr(form ? form : ""));
        return found;
    }
    double number(double least = -HUGE_VAL, double most = HUGE_VAL) const {
        return bounded("float", value_.is_number(), least, most);
    }
    std::int64_t whole(std::int64_t least, std::int64_t most) const {
        bounded("int", value_.is_number_integer(), least, most);
        return value_;
    }
    std::vector<Node> items(std::size_t least, std::size_t most) const {
        require_type(value_.is_array(), "array");
        const std::size_t size = value_.size();
        if (least == most) require(size == least, "array of length " + std::to_string(least));
        require(size >= least, "array of length >= " + std::to_string(least));
        require(size <= most, "array of length <= " + std::to_string(most));
        std::vector<Node> found;
        for (const json& item : value_)
            found.emplace_back(item, path_ + "[" + std::to_string(found.size()) + "]");
        return found;
    }
    std::map<std::string, std::string> texts() const {
        require_type(value_.is_object(), "object");
        std::map<std::string, std::string> found;
        for (const auto& [name, item] : value_.items())
            found[name] = Node(item, path_ + "." + name).text();
        return found;
    }

private:
    const json& value_;
    std::string path_;
    bool or_null_;

    template <typename Number>
    double bounded(const std::string& type, bool right, Number least, Number most) const {
        require_type(right, type);
        require(value_ >= least, type + " >= " + json(least).dump());
        require(value_ <= most, type + " <= " + json(most).dump());
        return value_;
    }
    void require_type(bool right, const std::string& type) const {
        require(right, type + (or_null_ ? " | null" : ""));
    }
    void require(bool right, const std::string& expected) const {
        if (right) return;
        if (value_.is_null())
            throw Fault("key '" + path_ + "' is of the wrong type (null); expected " + expected);
        // Lines without indent have a blank after each comma and colon, as Python writes them.
        std::string found = value_.is_string() ? repr(value_) : value_.dump(0, ' ', true, replace);
        found = std::regex_replace(found, std::regex(",\n"), ", ");
        found.erase(std::remove(found.begin(), found.end(), '\n'), found.end());
        throw Fault("key '" + path_ + "' is " +
                    (found.size() <= 60 ? found : found.substr(0, 57) + "...") + "; expected " +
                    expected);
    }
};

Preprocessing read_preprocessing(const Node& spec) {
    Preprocessing found;
    found.size = static_cast<int>(spec["size"].whole(INT_MIN, INT_MAX));
    if (spec.has("resize")) found.resize = spec["resize"].text();
    if (spec.has("box_rule")) found.box_rule = spec["box_rule"].text();
    if (spec.has("box_scale")) found.box_scale = spec["box_scale"].number();
    if (found.size < 16 || found.size > 1024)
        throw Fault("input size " + std::to_string(found.size) + " is outside 16..1024 pixels");
    if (found.resize != "area" && found.resize != "linear")
        throw Fault("resize " + repr(found.resize) + " is neither 'area' nor 'linear'");
    if (found.box_rule != "stretch" && found.box_rule != "square")
        throw Fault("box rule " + repr(found.box_rule) + " is none of stretch, square");
    if (!(found.box_scale >= 0.1 && found.box_scale <= 10))
        throw Fault("box scale " + json(found.box_scale).dump() + " is outside 0.1..10");
    return found;
}

// What is read of a manifest; `root` is the artifact's directory.
Artifact read_values(const Node& m, const std::string& root) {
    constexpr const char* name = "^[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)?$";
    Artifact a;
    a.path = root;
    const bool complete = m["state"].text("^(complete|deferred)$") == "complete";
    a.preprocessing = read_preprocessing(m["preprocessing"]["spec"]);
    const Node target = m["target"], golden = m["golden"], recipe = m["build"]["recipe"];
    a.target = target["name"].text();
    if (target.has("module")) a.module = target.at("module", true).text();
    if (target.has("compute_capabilities"))
        for (const Node& capability : target["compute_capabilities"].items(0, 32))
            a.compute_capabilities.push_back(capability.text("^[0-9]{1,2}\\.[0-9]$"));
    a.precision = m["precision"]["asked"].text("^(fp32|fp16|int8|fp8)$");
    for (const Node& file : m["files"].items(1, 64)) {
        const std::string path = file["path"].text(name, 200);
        a.files[path] = {file["sha256"].text("^[0-9a-f]{64}$"), file["size"].whole(0, 1ll << 32)};
    }
    const auto listed = [&](const Node& node, const std::string& key) {
        const std::string path = node.text(name, 200);
        if (!a.files.count(path)) throw Fault(key + ": " + path + " is not listed under files");
        return root + "/" + path;
    };
    listed(m["graph"], "graph");
    a.golden_path = listed(golden["file"], "golden.file");
    for (const Node& crop : golden["angles"].items(1, 64)) {
        const auto three = crop.items(3, 3);
        a.golden_angles.push_back({three[0].number(), three[1].number(), three[2].number()});
    }
    a.tolerance = golden["tolerance_degrees"].number(0, 360);
    if (recipe.has("dla")) a.dla_core = static_cast<int>(recipe["dla"].whole(0, 64));
    // A network of someone else may have no bins.
    const Node spec = m["network"].at("spec", true);
    if (!spec.is_null() && spec.has("bins")) {
        const Node bins = spec["bins"];
        a.first_bin = bins["first"].number(), a.last_bin = bins["last"].number();
    }
    const Node engine = m.at("engine", true);
    if (complete == engine.is_null())
        throw Fault("state " + std::string(complete ? "complete without" : "deferred with") +
                    " an engine");
    if (complete) {
        a.engine_kind = engine["kind"].text("^(openvino|onnxruntime|tensorrt|tensorrt-rtx)$");
        a.engine_path = listed(engine["files"].items(1, 16)[0], "engine.files[0]");
        a.versions = engine["versions"].texts();
    }
    return a;
}

// Version and digest, which every manifest begins with, are checked before anything is parsed.
Artifact read_manifest(const std::string& root) {
    std::error_code ignored;
    if (!fs::is_directory(root, ignored))
        throw Error(EDGEHP_DATA, root + ": no such artifact directory\nhint: make one with 'edgehp "
                                        "build', or name one that holds a " + manifest_name);
    require_plain(root, manifest_name);
    const std::string where = root + "/" + manifest_name;
    std::string bytes = read_file(where, largest_manifest + 1);
    if (bytes.size() > largest_manifest)
        incompatible(where + ": " + std::to_string(bytes.size()) + " bytes, expected at most " +
                     std::to_string(largest_manifest) + "; build the artifact again");
    static const std::regex head_form(
        "\\{\n \"schema_version\": ([0-9]{1,9}),\n \"digest\": \"([0-9a-f]{64})\",\n");
    static const std::regex by_form("\n \"edgehp_version\": \"([!-~]{1,40})\",\n");
    std::smatch head, by;
    if (!std::regex_search(bytes, head, head_form, std::regex_constants::match_continuous))
        incompatible(where + " is not a manifest of edgehp: it does not begin with a schema "
                             "version and a digest\nhint: build or copy the artifact again");
    const int version = std::stoi(head[1]);
    const std::string found_version = where + ": found manifest schema " + std::to_string(version);
    if (version < schema_version)
        incompatible(found_version + ", expected " + std::to_string(schema_version) +
                     ": made by an older edgehp: build it again");
    if (version > schema_version) {
        const bool known = std::regex_search(bytes, by, by_form);
        incompatible(found_version + ", this edgehp reads up to " + std::to_string(schema_version) +
                     "; it was written by edgehp " + (known ? by.str(1) : "of an unknown version") +
                     ": install that version or build the artifact again");
    }
    const std::string said = head[2];
    bytes.replace(static_cast<std::size_t>(head.position(2)), said.size(), said.size(), '0');
    std::istringstream stream(bytes);
    if (const std::string found = sha256(stream); found != said)
        incompatible(where + ": the manifest was altered: its digest is " + found.substr(0, 16) +
                     "..., it says " + said.substr(0, 16) +
                     "...\nhint: build the artifact again or copy it again");
    try {
        const json values = json::parse(bytes, nullptr, false);
        if (values.is_discarded()) throw Fault("it is not JSON in UTF-8");
        return read_values(Node(values), root);
    } catch (const Fault& fault) {
        incompatible(where + " is not a manifest of this version of edgehp: " + fault.what() +
                     "; build or copy the artifact again");
    }
}

// The release in a version: 10.14.1.48.post1 gives 10, 14, 1, 48. Trailing zeros do not count, nor
// what follows a hyphen, as in OpenVINO's 2026.4.0-21-abc.
std::vector<unsigned long> parse_version(const std::string& text) {
    static const std::regex form("v?([0-9]+(\\.[0-9]+)*)([^0-9].*)?");
    std::smatch found;
    if (!std::regex_match(text, found, form))
        throw Error(EDGEHP_DATA, "version " + repr(text) +
                                     " is not numbers joined by dots, such as '10.3.0'");
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

bool same_module(const Artifact& artifact, const std::optional<std::string>& here) {
    const std::string a = module_part(*artifact.module), b = module_part(here.value_or(""));
    if (a.empty() || b.empty()) return here == artifact.module;
    const auto parts = same_modules.find(artifact.target);
    return a == b || (parts != same_modules.end() && parts->second.count(a) &&
                      parts->second.count(b));
}

void check_version(const Artifact& artifact, const Device& device, const std::string& rebuild) {
    const std::string &kind = artifact.engine_kind, &where = artifact.path;
    const auto said = artifact.versions.find(kind);
    if (said == artifact.versions.end())
        incompatible(where + ": the manifest does not say which " + kind + " built the engine; " +
                     rebuild);
    const std::string& built = said->second;
    const std::string made = where + " was built with " + kind + " " + built + "; found ";
    std::string here = device.version(kind).value_or("");
    if (here.empty())
        throw Error(EDGEHP_ENVIRONMENT, where + " needs " + kind + " " + built +
                                            ", which is not installed; run 'edgehp doctor'");
    // These read what an older release wrote.
    if (kind == "openvino" || kind == "onnxruntime") {
        if (parse_version(here) < parse_version(built))
            incompatible(made + "the older " + here + ": install " + built + " or newer, or " +
                         rebuild);
        return;
    }
    // Of TensorRT's version-compatible engines: read by later releases of this major version.
    const auto major = artifact.versions.find("tensorrt_major");
    if (major != artifact.versions.end()) {
        const auto release = parse_version(here);
        if (release.empty() || std::to_string(release[0]) != major->second ||
            release < parse_version(built))
            incompatible(made + here + ": install " + built + " or a later " + major->second +
                         ".x, or " + rebuild);
        return;
    }
    // On a Jetson, TensorRT's Python package leaves out the number of the build: 10.3.0.
    if (std::count(built.begin(), built.end(), '.') == 2 &&
        std::count(here.begin(), here.end(), '.') == 3)
        here.resize(here.rfind('.'));
    if (parse_version(here) != parse_version(built))
        incompatible(made + here + ", and its engines need exactly the same version: install it, "
                                   "or " + rebuild);
}

void check_gpu(const Artifact& artifact, const Device& device) {
    std::string wanted;
    for (const std::string& capability : artifact.compute_capabilities)
        wanted += (wanted.empty() ? "" : " or ") + capability;
    wanted = "a GPU of compute capability " + wanted + " (target " + artifact.target + ")";
    std::vector<Device::Gpu> gpus;
    try {
        gpus = device.gpus();
    } catch (const Error& error) {
        throw Error(error.status, artifact.path + " needs " + wanted + ": " + error.what());
    }
    // The first GPU is the one a runtime takes unless told otherwise.
    const auto& right = artifact.compute_capabilities;
    if (!gpus.empty() &&
        std::find(right.begin(), right.end(), gpus[0].compute_capability) != right.end())
        return;
    incompatible(artifact.path + " was built for " + wanted + "; this machine has " +
                 (gpus.empty() ? "no NVIDIA GPU"
                               : gpus[0].name + " (compute capability " +
                                     gpus[0].compute_capability + ")") +
                 ": use it on the right device, or build one for this one with 'edgehp build "
                 "--target ...' (see 'edgehp targets')");
}

void check_device(const Artifact& artifact, const Device& device) {
    const std::string rebuild = "build it here: edgehp build --target " + artifact.target +
                                " --precision " + artifact.precision;
    if (!artifact.compute_capabilities.empty()) check_gpu(artifact, device);
    if (artifact.module)
        if (const auto here = device.module(); !same_module(artifact, here))
            incompatible(artifact.path + " was built on " + repr(*artifact.module) + "; this is " +
                         repr(here.value_or("no Jetson")) +
                         ", whose clocks, memory and number of SMs differ; " + rebuild);
    check_version(artifact, device, rebuild);
}

void check_files(const Artifact& artifact) {
    const std::string remedy = "\nhint: copy the artifact again or build it again";
    for (const auto& [name, record] : artifact.files) {
        const std::int64_t size = require_plain(artifact.path, name).st_size;
        if (size != record.size)
            incompatible(artifact.path + "/" + name + ": found " + std::to_string(size) +
                         " bytes, the manifest says " + std::to_string(record.size) + remedy);
    }
    for (const auto& [name, record] : artifact.files) {
        const std::string path = artifact.path + "/" + name;
        std::ifstream stream(path, std::ios::binary);
        if (const std::string found = sha256(stream); found != record.sha256)
            incompatible(path + " was changed: found SHA-256 " + found.substr(0, 16) +
                         "..., the manifest says " + record.sha256.substr(0, 16) + "..." + remedy);
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
    if (!unlisted.empty())
        incompatible(artifact.path + "/" + unlisted.begin()->string() +
                     ": a file that the manifest does not list; remove it, or build the artifact "
                     "again");
}

}  // namespace

Artifact load_artifact(const std::string& path, const Device& device) {
    const Artifact artifact = read_manifest(path.substr(0, path.find_last_not_of('/') + 1));
    if (artifact.engine_kind.empty())
        incompatible(artifact.path + " is deferred: its engine is not built yet\nhint: finish it "
                     "on the device (" + artifact.target + ") with: edgehp build --finish " +
                     artifact.path);
    const std::string& kind = artifact.engine_kind;
    if (!runtime_version(kind))
        throw Error(EDGEHP_ENVIRONMENT,
                    artifact.path + " is for " + kind + ", which is not built into this program\n" +
                        (kind == "openvino" || kind == "tensorrt"
                             ? "hint: build it with " + kind + ", see docs/cpp.md"
                             : "hint: build the artifact for OpenVINO or TensorRT"));
    check_device(artifact, device);
    check_files(artifact);
    return artifact;
}

std::optional<std::string> Device::module() const {
    const auto text = [](const char* path) {
        std::string found = read_file(path, 1 << 16);
        while (!found.empty() && (found.back() == '\0' || found.back() == '\n')) found.pop_back();
        return found;
    };
    std::string compatible = text("/proc/device-tree/compatible");
    std::replace(compatible.begin(), compatible.end(), '\0', ' ');
    if ((" " + compatible).find(" nvidia,tegra") == std::string::npos) return std::nullopt;
    std::string model = text("/proc/device-tree/model");
    if (model.empty()) model = "unnamed Jetson";
    const std::string part = module_part(compatible);
    return part.empty() ? model : model + " (" + part + ")";
}

}  // namespace edgehp
