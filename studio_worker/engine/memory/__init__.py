"""Where components are: on the device or in RAM, how they get there and away, and what there is room for."""
