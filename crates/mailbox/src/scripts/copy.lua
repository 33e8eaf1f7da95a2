-- copy: writes copies of a node's lease beside shards, and tells what stood there: another one than was
-- written last means that the shard forgot. Allowed when Redis is full.
--
-- KEYS  a shard: {s}:n and {s}:o. {s}:n is a hash, id -> "incarnation number ends state record"; `ends` is
--       when the lease ends, ms; the state H: held, G: given up; the record is names and values, NUL between.
-- ARGV  id, incarnation, number, ttl ms, state, how long others are kept after they ended, ms
--       (-1: do not look), record.
-- Reply now, then a shard: {1 written, 0 refused; incarnation and number that stood there, 0 and 0:
--       nothing}. Refused as in `lease`. A shard without a copy of a lease that was renewed before has lost
--       everything; the time is written to {s}:o (LOST).

local id, life, number = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local kept = tonumber(ARGV[6])
local ends = ARGV[5] == 'G' and NOW or NOW + tonumber(ARGV[4])
local text = table.concat({ ARGV[2], ARGV[3], int(ends), ARGV[5], ARGV[7] }, ' ')

-- Only lives that begin add fields, so only they look for old ones.
local function drop_old(key)
  local all = call('HGETALL', key)
  for i = 1, #all, 2 do
    local ended = tonumber(match(all[i + 1], '^%d+ %d+ (%d+)') or 0)
    if ended < NOW - kept then call('HDEL', key, all[i]) end
  end
end

local replies = { NOW_US }
for i = 1, #KEYS, 2 do
  local key = KEYS[i]
  local stood = call('HGET', key, id)
  local was_life, was_number = match(stood or '', '^(%d+) (%d+)')
  was_life, was_number = tonumber(was_life or 0), tonumber(was_number or 0)
  local refused = was_life > life or (was_life == life and was_number > number)
  if not refused then call('HSET', key, id, text) end
  if not stood and number > 1 then call('HSET', KEYS[i + 1], LOST, int(NOW)) end
  if kept >= 0 then drop_old(key) end
  replies[#replies + 1] = { refused and 0 or 1, int(was_life), int(was_number) }
end
return replies
