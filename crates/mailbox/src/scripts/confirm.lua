-- confirm: a session says that it lives. Restores what a failover or an expiry took. Allowed when
-- Redis is full.
--
-- KEYS  an item: head, queue, routes, timers.
-- ARGV  ttl ms, retry base ms, retry jitter, devices_max; then an item: member (app NUL user),
--       device, node, incarnation, connection, attempt, platform, epoch candidate, and the last
--       position that it acknowledged: epoch, generation, seq, chain or ''.
-- Reply now, then an item: {'C', 1 if the route was absent, epoch, newest} ·
--       {'S'} a newer session of the device is there, or came and went · {'U'} · {'E', text}
--
-- A route of the same node and connection under an older incarnation is mine: my lease had lapsed.

local TTL, BASE, JITTER = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local DEVICES_MAX = tonumber(ARGV[4])

-- The device as the session knows it, where the head has forgotten it. It keeps its position even if the next
-- entries were trimmed, and a device from another life of the mailbox starts at 0: in both cases the node
-- tells it that entries are gone.
local function remember(h, queue, name, a)
  local d = new_device(h, name, tonumber(ARGV[a + 1]))
  local seq, chain = tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
  if tonumber(ARGV[a]) ~= h.e then
    d.seq, d.chain = 0, 0
    return d
  end
  local ours = chain_at(h, queue, seq)
  if ours and (not chain or chain == ours) then
    d.seq, d.chain = seq, ours
  elseif seq < h.b then
    d.seq, d.chain = math.min(seq, h.b - 1), seq == h.b - 1 and h.bc or chain or 0
  end
  return d
end

local function confirm(k, a)
  local head, queue, routes, timers = KEYS[k], KEYS[k + 1], KEYS[k + 2], KEYS[k + 3]
  local member, name, attempt = ARGV[a], ARGV[a + 1], tonumber(ARGV[a + 5])
  local text, tail = call('HGET', routes, name), ''
  if text then
    local route = parse_route(text)
    local mine = route.node == ARGV[a + 2] and route.connection == ARGV[a + 4]
      and route.attempt == attempt
    if not mine and route.attempt >= attempt then return { 'S' } end
    if mine then tail = route.tail end
  end
  local h = find_head(head) or new_head(head, ARGV[a + 7])
  local d = find_device(h, name)
  local others, room = other_devices(h, d and name), true
  open(h, queue, TTL)
  if d and not text and d.fence > attempt then return { 'S' } end
  if not d then
    d = remember(h, queue, name, a + 8)
    room = add_device(h, routes, d, others, DEVICES_MAX)
  end
  if room then
    if d.seq >= h.n then
      d.due, d.attempt = 0, 0
    elseif d.due == 0 then
      d.due, d.attempt = NOW + spread(BASE, JITTER), 0
    elseif d.defers > 0 then -- its node was out of reach
      d.due = math.min(d.due, NOW + spread(BASE, JITTER))
    end
    d.used, d.fence, d.defers = NOW, attempt, 0
    if keeps_all(h) then trim_to_lowest(h, queue, d, others) end
    save(h, d)
    others[#others + 1] = d
  end
  local route = table.concat({ ARGV[a + 2], ARGV[a + 3], ARGV[a + 4], ARGV[a + 5],
    ARGV[a + 6] }, ' ') .. tail
  set_route(routes, name, text ~= route and route, TTL)
  set_timer(timers, member, others)
  return { 'C', text and 0 or 1, h.e, h.n }
end

return each(#KEYS / 4, confirm, 4, 12, 5)
