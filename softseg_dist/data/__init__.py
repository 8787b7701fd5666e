"""From files to prepared cases: volumes, layouts, preprocessing, the Arrow store, splits, the phantom."""
