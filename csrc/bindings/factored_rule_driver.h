// The rule driver of Adafactor and CAME, whose states are means over rows and columns (cpu/factored.h).
#pragma once

#include <memory>
#include <string>

#include "bindings/rule_driver.h"

namespace onepass {

// Returns the driver of a rule by its name; null if the rule is not one of the two.
std::unique_ptr<RuleDriver> make_factored_rule_driver(const std::string& rule);

}  // namespace onepass
