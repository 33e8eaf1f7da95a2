-- due: users whose timers may be due, for fire, which must declare every key that it touches. Writes nothing.
--
-- KEYS  timers of some shards.
-- ARGV  how many users at most in all, longest backoff ms.
-- Reply now, then a shard: {member, ...}. A score beyond now + longest backoff is due as well: a clock was ahead when
--       it was written.

local left, LONGEST_BACKOFF = tonumber(ARGV[1]), tonumber(ARGV[2])

local function due_members(timers)
  local members = call('ZRANGEBYSCORE', timers, '-inf', int(NOW), 'LIMIT', 0, left)
  if #members < left then
    local beyond = call('ZREVRANGEBYSCORE', timers, '+inf', '(' .. int(NOW + LONGEST_BACKOFF),
      'LIMIT', 0, left - #members)
    for _, member in ipairs(beyond) do members[#members + 1] = member end
  end
  return members
end

local replies = { NOW_US }
for i, timers in ipairs(KEYS) do
  local ok, members = pcall(due_members, timers)
  replies[i + 1] = ok and members or {}
  left = left - #replies[i + 1]
end
return replies
