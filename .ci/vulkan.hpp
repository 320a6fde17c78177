// What llama.cpp takes from Vulkan's headers and those of Debian 12 (1.3.239) do not have yet: the types of
// VK_EXT_layer_settings, which llama.cpp uses only if it is built to validate its calls. Included before its own files.
#pragma once
#include <vulkan/vulkan_core.h>

#if VK_HEADER_VERSION < 272
#include <cstdint>
#include <vector>

namespace vk {

enum class LayerSettingTypeEXT { eBool32 = 0 };

struct LayerSettingEXT {
    const char * layer;
    const char * setting;
    LayerSettingTypeEXT type;
    uint32_t n_values;
    const void * values;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & all)
        : n_settings(static_cast<uint32_t>(all.size())), settings(all.data()) {}

    VkStructureType type = static_cast<VkStructureType>(1000496000);  // VK_STRUCTURE_TYPE_LAYER_SETTINGS_CREATE_INFO_EXT
    const void * next = nullptr;
    uint32_t n_settings;
    const LayerSettingEXT * settings;
};

}  // namespace vk
#endif
