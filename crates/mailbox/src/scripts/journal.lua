-- journal: the audiences with messages after a number. Writes nothing.
--
-- KEYS  an item: journal.
-- ARGV  an item: after (a number), how many audiences at most.
-- Reply now, then an item:
--       {'N', highest number that was trimmed, highest number of all, then audiences and the numbers of their newest
--        messages, oldest first}
--       {'E', text}

local NUMBERS = 'N'

local function read(key_at, arg_at)
  local journal, count = KEYS[key_at], tonumber(ARGV[arg_at + 1])
  local trimmed = tonumber(call('ZSCORE', journal, '') or 0)
  local highest = call('ZREVRANGE', journal, '0', '0', 'WITHSCORES')[2]
  local changed = call('ZRANGEBYSCORE', journal, '(' .. ARGV[arg_at], '+inf', 'WITHSCORES', 'LIMIT',
    '0', int(count))
  local reply = { NUMBERS, trimmed, tonumber(highest) or 0 }
  for i = 1, #changed, 2 do
    if changed[i] ~= '' then
      reply[#reply + 1], reply[#reply + 2] = changed[i], tonumber(changed[i + 1])
    end
  end
  return reply
end

return each(#KEYS, read, 1, 2, 1)
