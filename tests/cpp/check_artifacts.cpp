// For tests/test_cpp.py: checks one artifact after another, so that hundreds of them need one
// process. A line of standard input is {"path": ..., "device": null | {"gpus": [[name, capability]],
// "module": null | "...", "versions": {kind: version}}, "open": bool}; a line of output is
// {"status": ..., "error": ...}.
#include <iostream>

#include <nlohmann/json.hpp>

#include "edgehp.hpp"

namespace {

using nlohmann::json;

edgehp::Device told(const json& values) {
    edgehp::Device device;
    values["gpus"].get_to(device.gpus);
    if (!values["module"].is_null()) device.module = values["module"].get<std::string>();
    values["versions"].get_to(device.versions);
    return device;
}

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
            else if (const auto device = told(asked["device"]); true)
                edgehp::load_artifact(path, &device);
        } catch (const edgehp::Error& fault) {
            status = fault.status;
            error = fault.what();
        }
        std::cout << json{{"status", status}, {"error", error}} << '\n';
    }
}
