"""Data prepared for training: `helixpipe prepare` writes token shards, `prepared.Prepared` reads them. No torch here."""
