"""Another machine as a runtime: engines are compiled and timed there, over ssh."""
