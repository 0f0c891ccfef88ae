"""How fast drafters learn: scenarios of traffic, arms that are compared on them, and the measures of learning speed."""
