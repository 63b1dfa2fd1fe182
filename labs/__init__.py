"""A course: four labs and what checks them; the top level never imports it."""
