# Sources of src/conditioning: target_sources(turboquant PRIVATE ...).
target_sources(turboquant PRIVATE
    conditioning/conditioning.cpp
    conditioning/profile.cpp
    conditioning/statistics.cpp)
