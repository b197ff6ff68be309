// For tests/test_cpp.py: checks one artifact after another, so that hundreds of them need one
// process. A line of standard input is {"path": ..., "device": null | {"gpus": [[name, capability]],
// "module": null | "...", "versions": {kind: version}}, "open": bool}; a line of output is
// {"status": ..., "error": ...}.
#include <iostream>

#include <nlohmann/json.hpp>

#include "edgehp.hpp"

namespace {

using nlohmann::json;

class Told final : public edgehp::Device {
public:
    explicit Told(json values) : values_(std::move(values)) {}
    std::vector<Gpu> gpus() const override {
        std::vector<Gpu> found;
        for (const json& gpu : values_["gpus"]) found.push_back({gpu[0], gpu[1]});
        return found;
    }
    std::optional<std::string> module() const override { return text(values_, "module"); }
    std::optional<std::string> version(const std::string& kind) const override {
        return text(values_["versions"], kind);
    }

private:
    json values_;
    static std::optional<std::string> text(const json& values, const std::string& key) {
        if (!values.contains(key) || values[key].is_null()) return std::nullopt;
        return values[key].get<std::string>();
    }
};

}  // namespace

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        const json asked = json::parse(line);
        const std::string path = asked["path"];
        int status = 0;
        std::string error;
        try {
            if (asked["open"])
                edgehp::HeadPose{path, 1};
            else if (asked["device"].is_null())
                edgehp::load_artifact(path);
            else
                edgehp::load_artifact(path, Told(asked["device"]));
        } catch (const edgehp::Error& fault) {
            status = fault.status;
            error = fault.what();
        }
        std::cout << json{{"status", status}, {"error", error}} << '\n';
    }
}
