-- defer: gives claims back, because nobody could be reached: that is not the device's failure to
-- answer. Only while the score is still the claimed one. Allowed when Redis is full.
--
-- KEYS  an item: head, timers.
-- ARGV  base ms, base ms of a full node, retry max ms, retry jitter; then an item: member (app NUL
--       user), claimed score, its devices (NUL between), each behind a letter that says why: 'D' its
--       node is down, 'F' full, 'V' gone, 'A' nobody could be asked.
-- Reply now, then an item: {'D'} given back · {'K'} somebody else moved it, kept · {'U'} · {'E', text}
--
-- The wait doubles with each time in a row, up to retry max, and is that at once where the node is
-- gone: its sessions are as well, or they confirm that they live. Whatever shows that a node has the
-- device again (connect, confirm, an ack that moves the cursor) begins anew and pulls the due time
-- forward. An outage of all that lies between counts as none: it ends for everybody at once.

local BASES = { D = tonumber(ARGV[1]), F = tonumber(ARGV[2]), V = tonumber(ARGV[3]) }
local MAX, JITTER = tonumber(ARGV[3]), tonumber(ARGV[4])

local function put_off(d, why)
  local wait = BASES.D
  if why ~= 'A' then
    wait = math.min((BASES[why] or BASES.D) * 2 ^ math.min(d.defers, 30), MAX)
    d.defers = math.min(d.defers + 1, BYTE_MAX)
  end
  d.attempt, d.due = d.attempt - 1, NOW + spread(wait, JITTER)
end

local function defer(k, a)
  local head, timers, member = KEYS[k], KEYS[k + 1], ARGV[a]
  local score = call('ZSCORE', timers, member)
  if not score or tonumber(score) ~= tonumber(ARGV[a + 1]) then return { 'K' } end
  local h = find_head(head)
  if not h then return { 'K' } end
  local given = {}
  for why, name in string.gmatch(ARGV[a + 2], '([^%z])([^%z]+)') do given[name] = why end
  local devices = other_devices(h)
  for _, d in ipairs(devices) do
    if given[d.name] and d.due > 0 and d.attempt > 0 then
      put_off(d, given[d.name])
      save_device(h, d)
    end
  end
  set_timer(timers, member, devices)
  return { 'D' }
end

return each(#KEYS / 2, defer, 2, 3, 5)
