-- disconnect: a session is over. Its route goes only if it is still its own. Allowed when Redis is
-- full.
--
-- KEYS  an item: head, routes, timers.
-- ARGV  an item: member (app NUL user), device, node, incarnation, connection.
-- Reply now, then an item: {'R'} removed · {'K'} another session's or none, kept · {'U'} · {'E', text}

local function disconnect(k, a)
  local head, routes, timers = KEYS[k], KEYS[k + 1], KEYS[k + 2]
  local member, name = ARGV[a], ARGV[a + 1]
  local text = call('HGET', routes, name)
  if not text then return { 'K' } end
  local route = parse_route(text)
  if route.node ~= ARGV[a + 2] or route.incarnation ~= ARGV[a + 3]
    or route.connection ~= ARGV[a + 4] then
    return { 'K' }
  end
  local h = find_head(head)
  local d = h and find_device(h, name)
  local others = d and other_devices(h, name)
  call('HDEL', routes, name)
  if d then
    d.used, d.due, d.attempt, d.defers = NOW, 0, 0, 0
    save_device(h, d)
    set_timer(timers, member, others)
  end
  return { 'R' }
end

return each(#KEYS / 3, disconnect, 3, 5, 1)
