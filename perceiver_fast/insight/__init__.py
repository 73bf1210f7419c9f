"""For people: explaining, counting, watching, drawing attention, roofs, and the geometries that are measured."""
