-- ack: a device has everything up to a position. Allowed when Redis is full: it is what frees it.
--
-- KEYS  an item: head, queue, routes, timers.
-- ARGV  ttl ms, retry base ms, retry jitter, devices_max; then an item: member (app NUL user),
--       device, node, incarnation, connection, epoch candidate, and what it acknowledges: epoch,
--       generation, seq, chain.
-- Reply now, then an item: {'A', cursor} · {'R', epoch, generation, seq, chain} the history forked
--       or the epoch is another: start over from there · {'S'} sent under an older generation ·
--       {'E', text}

local TTL, BASE, JITTER = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local DEVICES_MAX = tonumber(ARGV[4])

-- Whether the route is still that of the session that heard the ack.
local function is_routed(routes, name, a)
  local text = call('HGET', routes, name)
  if not text then return false end
  local route = parse_route(text)
  return route.node == ARGV[a] and route.incarnation == ARGV[a + 1]
    and route.connection == ARGV[a + 2]
end

-- The mailbox keeps what its slowest known device needs.
local function trim_to_lowest(h, queue, devices)
  local lowest = devices[1]
  for _, d in ipairs(devices) do
    if d.seq < lowest.seq then lowest = d end
  end
  if lowest then trim(h, queue, lowest.seq, lowest.chain) end
end

local function ack(k, a)
  local head, queue, routes, timers = KEYS[k], KEYS[k + 1], KEYS[k + 2], KEYS[k + 3]
  local member, name = ARGV[a], ARGV[a + 1]
  local epoch, generation = tonumber(ARGV[a + 6]), tonumber(ARGV[a + 7])
  local seq, chain = tonumber(ARGV[a + 8]), tonumber(ARGV[a + 9])
  local h = open_head(head, queue, ARGV[a + 5], TTL)
  local d, others = find_device(h, name), other_devices(h, name)
  if d and d.generation > generation then return { 'S' } end
  if not d then
    d = { name = name, seq = h.b - 1, chain = h.bc, generation = generation, due = 0, attempt = 0,
      used = NOW, fence = 0 }
    if not add_device(h, routes, d, others, DEVICES_MAX) then return { 'A', seq } end
  end

  local ours = chain_at(h, queue, seq)
  local reset = epoch ~= h.e or seq > h.n or (ours and ours ~= chain)
  local progress = false
  if reset then
    reset_device(h, d, generation)
  else
    d.generation = generation
    if ours and seq > d.seq then
      d.seq, d.chain, progress = seq, ours, true
    end
  end
  d.used = NOW
  local due = d.due
  if d.seq >= h.n then
    d.due, d.attempt = 0, 0
  elseif (progress or reset) and is_routed(routes, name, a + 2) then
    d.due, d.attempt = NOW + spread(BASE, JITTER), 0
  end
  save_device(h, d)
  others[#others + 1] = d
  if d.due ~= due then set_timer(timers, member, others) end
  if progress then trim_to_lowest(h, queue, others) end
  if reset then return { 'R', h.e, d.generation, d.seq, d.chain } end
  return { 'A', d.seq }
end

return each(#KEYS / 4, ack, 4, 10, 5)
