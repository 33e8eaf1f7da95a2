-- disconnect: a session has ended. Removes its route if the route still names this session. Allowed when Redis is full.
--
-- KEYS  an item: head, routes, timers.
-- ARGV  an item: member (app NUL user), device, node, incarnation, connection.
-- Reply now, then an item:
--       {'R'}  removed
--       {'K'}  kept: another session's route, or none
--       {'U'}, {'E', text}

local REMOVED, KEPT = 'R', 'K'

local function disconnect(key_at, arg_at)
  local head, routes, timers = KEYS[key_at], KEYS[key_at + 1], KEYS[key_at + 2]
  local member, name = ARGV[arg_at], ARGV[arg_at + 1]
  local stored_route = call('HGET', routes, name)
  if not stored_route then return { KEPT } end
  local route = parse_route(stored_route)
  if route.node ~= ARGV[arg_at + 2] or route.incarnation ~= ARGV[arg_at + 3]
    or route.connection ~= ARGV[arg_at + 4] then
    return { KEPT }
  end
  local mailbox = find_mailbox(head)
  local device = mailbox and find_device(mailbox, name)
  local others = device and other_devices(mailbox, name)
  call('HDEL', routes, name)
  if device then
    disarm_device(device)
    device.used_at = NOW
    save_device(mailbox, device)
    set_timer(timers, member, others)
  end
  return { REMOVED }
end

return each(#KEYS / 3, disconnect, 3, 5, 1)
