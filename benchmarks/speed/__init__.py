"""What a harmonized step costs and how exact it is, beside every peer."""
