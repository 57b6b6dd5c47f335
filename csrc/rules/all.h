// The headers of all rules. registry.h is the list of rules; C++ cannot include files from a list, so the headers are
// named here again. A rule that is missing here, or in the list, does not compile: the list names the struct, and the
// struct its enumerator (`id`).
#pragma once

#include "rules/adabelief.h"
#include "rules/adadelta.h"
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/adamax.h"
#include "rules/adan.h"
#include "rules/ademamix.h"
#include "rules/adopt.h"
#include "rules/asgd.h"
#include "rules/laprop.h"
#include "rules/lion.h"
#include "rules/muon.h"
#include "rules/nadam.h"
#include "rules/radam.h"
#include "rules/rmsprop.h"
#include "rules/rprop.h"
#include "rules/schedule_free_adamw.h"
#include "rules/schedule_free_radam.h"
#include "rules/schedule_free_sgd.h"
#include "rules/sgd.h"
#include "rules/signum.h"
#include "rules/sparse_adam.h"
