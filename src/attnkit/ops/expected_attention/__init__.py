"""Expected attention: what attention cached keys will get from queries that have not come yet."""
