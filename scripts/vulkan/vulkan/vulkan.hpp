// Debian 12's Vulkan headers (1.3.239) lack VK_EXT_layer_settings. ggml-vulkan.cpp names one structure
// of it, to switch the validation layer on, which nobody does here. Found before the system's header
// by CPLUS_INCLUDE_PATH; adds nothing where that one has it.
#pragma once
#include_next <vulkan/vulkan.hpp>
#ifndef VK_EXT_layer_settings

#include <cstdint>
#include <vector>

namespace VULKAN_HPP_NAMESPACE {

enum class LayerSettingTypeEXT : int32_t { eBool32 = 0 };

struct LayerSettingEXT {
    const char * pLayerName;
    const char * pSettingName;
    LayerSettingTypeEXT type;
    uint32_t valueCount;
    const void * pValues;
};

// As of Vulkan 1.3.272, VkLayerSettingsCreateInfoEXT.
struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings)
        : settingCount(static_cast<uint32_t>(settings.size())), pSettings(settings.data()) {}

    int32_t sType = 1000496000;
    const void * pNext = nullptr;
    uint32_t settingCount;
    const LayerSettingEXT * pSettings;
};

} // namespace VULKAN_HPP_NAMESPACE

#endif
