// The rule driver of Adafactor, whose states are means over rows and columns (cpu/factored.h).
#pragma once

#include <memory>

#include "bindings/rule_driver.h"

namespace onepass {

std::unique_ptr<RuleDriver> make_factored_rule_driver();

}  // namespace onepass
