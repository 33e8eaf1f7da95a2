-- copies: the copies of leases beside a shard. Writes nothing.
--
-- KEYS  {s}:n
-- Reply now, then for each copy: id, text (see `copy`).

local replies = call('HGETALL', KEYS[1])
table.insert(replies, 1, NOW_US)
return replies
