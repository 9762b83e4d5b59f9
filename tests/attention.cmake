# Tests of attention.
tq_add_test(attention_test SOURCES attention_cases_test.cpp attention_features_test.cpp LABELS core)
tq_add_test(attention_memory_test SOURCES attention_memory_test.cpp LABELS core)
if(TARGET rapidcheck)
    tq_add_test(attention_property_test SOURCES attention_property_test.cpp LABELS core)
else()
    message(WARNING "RapidCheck not found: attention_property_test is left out")
endif()
