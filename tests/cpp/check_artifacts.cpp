// For tests/test_cpp.py: checks one artifact after another, so that hundreds of them need one
// process. A line of standard input is {"path": ..., "device": null | {"gpus": [[name, capability]],
// "module": null | "...", "versions": {kind: version}}, "open": bool}; a line of output is
// {"status": ..., "error": ...}.
#include <iostream>

#include "edgehp.hpp"

namespace {

using edgehp::json::Value;

class Told final : public edgehp::Device {
public:
    explicit Told(const Value& values) : values_(values) {}
    std::vector<Gpu> gpus() const override {
        std::vector<Gpu> found;
        for (const Value& gpu : values_["gpus"].items)
            found.push_back({gpu.items[0].text, gpu.items[1].text});
        return found;
    }
    std::optional<std::string> module() const override {
        const Value& module = values_["module"];
        return module.is_null() ? std::nullopt : std::optional(module.text);
    }
    std::optional<std::string> version(const std::string& kind) const override {
        const Value* found = values_["versions"].find(kind);
        return found ? std::optional(found->text) : std::nullopt;
    }

private:
    const Value& values_;
};

}  // namespace

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        const Value asked = edgehp::json::parse(line);
        const std::string path = asked["path"].text;
        int status = 0;
        std::string error;
        try {
            if (asked["open"].boolean)
                edgehp::HeadPose{path, 1};
            else if (asked["device"].is_null())
                edgehp::load_artifact(path);
            else
                edgehp::load_artifact(path, Told(asked["device"]));
        } catch (const edgehp::Error& fault) {
            status = fault.status;
            error = fault.what();
        }
        std::cout << "{\"status\":" << status << ",\"error\":" << edgehp::json::escaped(error)
                  << "}\n";
    }
}
