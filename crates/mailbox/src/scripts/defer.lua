-- defer: gives claims back, because nobody could be reached: that is not the device's failure to
-- answer. Only while the score is still the claimed one. Allowed when Redis is full.
--
-- KEYS  an item: head, timers.
-- ARGV  an item: member (app NUL user), claimed score, due again after ms, the devices (NUL between).
-- Reply now, then an item: {'D'} given back · {'K'} somebody else moved it, kept · {'U'} · {'E', text}

local function defer(k, a)
  local head, timers, member = KEYS[k], KEYS[k + 1], ARGV[a]
  local score = call('ZSCORE', timers, member)
  if not score or tonumber(score) ~= tonumber(ARGV[a + 1]) then return { 'K' } end
  local h = find_head(head)
  if not h then return { 'K' } end
  local given = {}
  for name in string.gmatch(ARGV[a + 3], '[^%z]+') do given[name] = true end
  local devices = other_devices(h)
  for _, d in ipairs(devices) do
    if given[d.name] and d.due > 0 and d.attempt > 0 then
      d.attempt, d.due = d.attempt - 1, NOW + tonumber(ARGV[a + 2])
      save_device(h, d)
    end
  end
  set_timer(timers, member, devices)
  return { 'D' }
end

return each(#KEYS / 2, defer, 2, 4, 1)
