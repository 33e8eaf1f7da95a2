-- due: who may be due, for fire, which must be told every key that it touches. Writes nothing.
--
-- KEYS  timers of some shards.
-- ARGV  how many at most in all, the longest backoff in ms.
-- Reply now, then a shard: {member, …}. A score beyond now + the longest backoff is due too: a
--       clock was ahead when it was written.

local left, LONGEST = tonumber(ARGV[1]), tonumber(ARGV[2])
local replies = { NOW_US }
for i, timers in ipairs(KEYS) do
  local ok, members = pcall(function()
    local due = call('ZRANGEBYSCORE', timers, '-inf', int(NOW), 'LIMIT', 0, left)
    if #due < left then
      local far = call('ZREVRANGEBYSCORE', timers, '+inf', '(' .. int(NOW + LONGEST),
        'LIMIT', 0, left - #due)
      for _, member in ipairs(far) do due[#due + 1] = member end
    end
    return due
  end)
  replies[i + 1] = ok and members or {}
  left = left - #replies[i + 1]
end
return replies
