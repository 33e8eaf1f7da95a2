-- copy: writes copies of a node's lease beside shards, and returns what they replace: anything but the copy written
-- last means that the shard lost data. Allowed when Redis is full.
--
-- KEYS  a shard: {s}:n, {s}:o. {s}:n is a hash, id -> "incarnation number ends state record": `ends` is when
--       the lease ends, ms; state H held, G released; the record is names and values, NUL between them.
-- ARGV  id, incarnation, number, ttl ms, state, how long copies of ended leases are kept, ms (-1: do not look for
--       them), record.
-- Reply now, then a shard: {1 written, 0 refused; incarnation and number of the copy before, 0 and 0 if there was
--       none}. Refused as in `lease`. A shard without a copy of a lease that was renewed before has lost
--       everything: the time is written to {s}:o (LOST).

local id, incarnation, number = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local state, keep_ended = ARGV[5], tonumber(ARGV[6])
local RELEASED = 'G'
local ends = state == RELEASED and NOW or NOW + tonumber(ARGV[4])
local text = table.concat({ ARGV[2], ARGV[3], int(ends), state, ARGV[7] }, ' ')

-- Only new incarnations add fields, so only their first copies look for ended ones.
local function drop_ended(copies)
  local fields = call('HGETALL', copies)
  for i = 1, #fields, 2 do
    local ended = tonumber(match(fields[i + 1], '^%d+ %d+ (%d+)') or 0)
    if ended < NOW - keep_ended then call('HDEL', copies, fields[i]) end
  end
end

local replies = { NOW_US }
for i = 1, #KEYS, 2 do
  local copies, positions = KEYS[i], KEYS[i + 1]
  local before = call('HGET', copies, id)
  local incarnation_before, number_before = match(before or '', '^(%d+) (%d+)')
  incarnation_before = tonumber(incarnation_before or 0)
  number_before = tonumber(number_before or 0)
  local refused = incarnation_before > incarnation
    or (incarnation_before == incarnation and number_before > number)
  if not refused then call('HSET', copies, id, text) end
  if not before and number > 1 then call('HSET', positions, LOST, int(NOW)) end
  if keep_ended >= 0 then drop_ended(copies) end
  replies[#replies + 1] = { refused and 0 or 1, int(incarnation_before), int(number_before) }
end
return replies
